"""A whole vision-language model as vision encoder, language encoder and fusion, out of one folder."""

from __future__ import annotations

import math
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tutti.models.fusion.states import StateFusion
from tutti.models.held import held
from tutti.models.interfaces import Fused, LanguageEncoder, Past
from tutti.models.language.writing import Written
from tutti.models.layers import project
from tutti.models.pretrained.facts import OUTPUT
from tutti.models.pretrained.networks import built, output_of, persistent, without
from tutti.models.pretrained.tower import Part, Tower
from tutti.models.pretrained.vlm_config import VlmConfig, VlmFusionConfig, VlmVisionConfig
from tutti.models.pretrained.vlm_vision import EYES, VlmVision
from tutti.types import DataSpec, Robots, Tokens, UserError

EMBEDDING = "embed_tokens"


def build_vlm(
    config: VlmConfig, seen: VlmVisionConfig, fused: VlmFusionConfig, spec: DataSpec
) -> tuple[VlmVision, VlmLanguage, VlmFusion]:
    """The three parts of one network, random until they are loaded.

    Raises: UserError if it cannot be built, has fewer layers, or does not fit the pictures or the tokenizer.
    """
    kind, facts, network = config.values()["model_type"], config.facts(), built(config)
    decoder = network.get_submodule(facts.decoder)
    embedding: Any = decoder.get_submodule(EMBEDDING)
    blocks = [*decoder.get_submodule("layers").children()]
    count = len(blocks) if config.layers == "all" else config.layers
    if count > len(blocks):
        raise UserError(
            f"{config.key}.layers is {count}, but the language model of {config.path} has {len(blocks)} "
            "blocks.\n  expected: at most so many, or all"
        )
    decoder.layers = nn.ModuleList(blocks[:count])
    without(network, facts.unread)
    names = {name for name, _ in persistent(network)}
    output = [OUTPUT] if OUTPUT in network._modules else []
    words = _cut_out(network, f"{facts.decoder}.{EMBEDDING}", *output)
    setattr(decoder, EMBEDDING, nn.Identity())
    parts = {
        "vision": (_cut_out(network, *facts.seeing), facts.blocks),
        "language": (words, ""),
        "fusion": (_cut_out(network, facts.decoder), f"{facts.decoder}.layers"),
    }
    towers = {
        socket: Tower(config, Part(network=part, blocks=path, names=names))
        for socket, (part, path) in parts.items()
    }
    vision = EYES[kind](config, towers["vision"], spec, withhold=seen.withhold)
    vision.measure()
    language = VlmLanguage(config, towers["language"], embedding.weight.shape, spec)
    fusion = VlmFusion(config, fused, towers["fusion"], spec=spec, vision=vision)
    language.reader.append(fusion)
    return vision, language, fusion


def _cut_out(network: nn.Module, *paths: str) -> nn.Module:
    """A module that holds these submodules alone, under their names."""
    root = nn.Module()
    for path in paths:
        *above, name = path.split(".")
        place = root
        for one in above:
            if one not in place._modules:
                place.add_module(one, nn.Module())
            place = place.get_submodule(one)
        place.add_module(name, network.get_submodule(path))
    return root


class VlmLanguage(LanguageEncoder):
    """The word embedding of a VLM: every token of the text, before any of them has seen another."""

    def __init__(self, config: VlmConfig, tower: Tower, shape: tuple[int, int], spec: DataSpec) -> None:
        super().__init__()
        self.tower, self.num_tokens = tower, spec.text_length
        rows, self.width = shape
        if spec.vocab_size > rows:
            raise UserError(
                f"{config.key}: the tokenizer of {config.path} has {spec.vocab_size:,} tokens, its language "
                f"model embeds {rows:,}.\n  cure: put the tokenizer.json of this very model beside its "
                "config.json"
            )
        # The decoder that it writes with: used, not registered, since it is the fusion's.
        self.reader: list[VlmFusion] = []

    @property
    def embedding(self) -> Any:
        """That of words, with the scale that Gemma gives them."""
        return self.tower.network.get_submodule(f"{self.tower.facts.decoder}.{EMBEDDING}")

    @property
    def output(self) -> Float[Tensor, "v d"]:
        """The matrix of the output layer: a row a word."""
        return output_of(self.tower.network, self.embedding)

    def forward(self, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Tokens:
        """Token ids to (b, l, width)."""
        return Tokens(values=self.embedding(text), mask=text_mask)

    def held(self, boundaries: Collection[str]) -> AbstractContextManager[None]:
        """The same, and its decoder, that of the fusion, if "fused" is among them."""
        decoder = self.reader if "fused" in boundaries else []
        return held(*([self] if "language" in boundaries else []), *decoder)

    def require_writer(self, key: str) -> None:
        """Raises: UserError unless the whole decoder is there, and its output layer."""
        config, values = self.tower.config, self.tower.values
        apart = not values.get("tie_word_embeddings") and OUTPUT not in self.tower.network._modules
        wrong = "has an output layer of its own" if apart else ""
        if getattr(config, "layers", "all") not in ("all", values["text_config"].get("num_hidden_layers")):
            wrong = "is cut behind an earlier block"
        if wrong:
            raise UserError(
                f"{key} lets the language model write, but that of {config.path} {wrong}.\n  expected: "
                f"{config.key}.layers=all, and of SmolVLM and larger Qwen {config.key}.output_layer=true"
            )

    def write(
        self,
        before: Tokens,
        text: Int[Tensor, "b l"],
        text_mask: Bool[Tensor, "b l"],
        answer: Int[Tensor, "b k"],
        answer_mask: Bool[Tensor, "b k"],
    ) -> Float[Tensor, "b k c"]:
        """The VLM's own decoder once more, over one sequence of all: what is given as in its fusion, the
        answer causally; a gradient passes it where it is frozen."""
        words, said = (
            Tokens(values=self.embedding(ids), mask=mask)
            for ids, mask in ((text, text_mask), (answer, answer_mask))
        )
        sequence = Written.of(before, words, said)
        return self._capped(sequence.at_asked(self.reader[0].write(sequence)) @ self.output.T)

    def require_words(self, key: str) -> None:
        """Raises: UserError as `require_writer`, or if its tokens of pictures have places in a grid."""
        self.require_writer(key)
        if self.tower.facts.grid:
            raise UserError(
                f"{key} lets a {self.tower.values['model_type']} write actions, whose pictures have places "
                "in a grid.\n  expected: PaliGemma\n  cure: model.action.writer=own"
            )

    def behind(
        self, vision: Tokens, words: Tokens, x: Float[Tensor, "b n d"], rows: Int[Tensor, " v"]
    ) -> Float[Tensor, "b n v"]:
        """The logits of the words `rows` behind embedded tokens that follow pictures and text causally."""
        said = Tokens(values=x, mask=words.mask.new_ones(x.shape[:2]))
        sequence = Written.of(vision, words, said)
        sequence = replace(
            sequence, asked=sequence.given[:, None] + torch.arange(x.shape[1], device=x.device)
        )
        hidden = sequence.at_asked(self.reader[0].write(sequence))
        return self._capped(hidden @ self.output[rows].T)

    def _capped(self, logits: Tensor) -> Tensor:
        cap = self.tower.values["text_config"].get("final_logit_softcapping")
        return logits if cap is None else cap * torch.tanh(logits / cap)


class SharingBlock(nn.Module):
    """Before the class of a decoder's block: it also gives its keys and values, (b, n, 2 k e)."""

    def forward(self, *inputs: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """What the block gives, and what it would put into a cache."""
        kept = Kept()
        x: Any = super().forward(*inputs, **named, past_key_values=kept)  # pyright: ignore
        return x, torch.cat(kept.both, dim=-1).transpose(1, 2).flatten(2)


class Kept:
    """What a block takes for a cache."""

    def update(self, keys: Tensor, values: Tensor, *_: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        """The same, which are looked at."""
        self.both = (keys, values)
        return self.both


class VlmFusion(StateFusion):
    """The decoder blocks of a VLM over [vision, language, state, readout], then its last norm.

    Vision and language see each other, by `mask` all of them or those before them alone. The state and the
    learned readout see all that stands before them, and nothing before them sees them: whatever they hold,
    the VLM computes what it did in its own training. Earlier moments of a history stand first: their vision
    tokens before the present ones, their states before the present one, with a learned vector of the moment.

    Positions count what is there, so an absent view or a short text leaves no gap. A masked token is seen by
    itself alone. `layers` are the tokens behind each block, before the last norm.
    """

    def __init__(
        self, config: VlmConfig, own: VlmFusionConfig, tower: Tower, *, spec: DataSpec, vision: VlmVision
    ) -> None:
        super().__init__()
        self.tower, self.causal = tower, config.mask == "causal"
        self.width, self.depth = self.decoder.config.hidden_size, len(self.decoder.layers)
        self.tokens_per_view = vision.tokens_per_view
        self.take_states(spec, dropout=own.state_dropout, withhold=own.withhold_state)
        self.prompt, self.shares = None, False
        self.readout = nn.Parameter(torch.randn(self.width) * 0.02)
        if moments := len(spec.history) - 1:
            self.time_embedding = nn.Parameter(torch.zeros(moments, self.width))

    def share(self) -> None:
        """From now on `layers` are the keys and values of each block, behind their rotation, side by side."""
        self.shares = True
        for block in self.decoder.layers:
            own = type(block)
            block.__class__ = type(own.__name__, (SharingBlock, own), {"__module__": own.__module__})

    @property
    def decoder(self) -> Any:
        """The language model without its word embedding."""
        return self.tower.network.get_submodule(self.tower.facts.decoder)

    def forward(
        self,
        vision: Tokens,
        language: Tokens,
        state: Float[Tensor, "b s"],
        state_mask: Bool[Tensor, " b"],
        past: Past | None = None,
        *,
        robots: Robots | None = None,
    ) -> Fused:
        """The readout, the fused tokens, and those behind each block.

        Raises: ValueError without `robots`, where it is told of them.
        """
        b, now = len(state), vision.values.shape[1]
        state, past = self.withheld(state, past)
        seen, values, mask = vision.values, [], []
        if past is not None:
            moments, earlier = self.time_embedding, past.vision.values
            times = moments.repeat_interleave(earlier.shape[1] // len(moments), dim=0)
            times = nn.functional.pad(times, (0, earlier.shape[2] - self.width))
            seen = torch.cat([earlier + times, seen], dim=1)
            if self.state is not None:
                states = torch.where(past.state_mask[..., None], past.state, 0.0)
                values.append(project(self.state, states, robots) + moments)
                mask.append(past.state_mask)
        # 0 where it is not known: a NaN in a masked token would still reach the gradient.
        known = torch.where(state_mask[:, None], state, 0.0)
        if self.state is not None:
            values.append(project(self.state, known, robots)[:, None])
            mask.append(state_mask[:, None])
        values.append(self.prompted(self.readout.expand(b, 1, -1), robots))
        mask.append(torch.ones_like(state_mask[:, None]))
        pictures = vision.mask if past is None else torch.cat([past.vision.mask, vision.mask], dim=1)
        prefix = torch.cat([pictures, language.mask], dim=1)
        x = torch.cat([seen[..., : self.width], language.values, *values], dim=1)
        deep = seen[..., self.width :]
        x, layers = self.decode(x, torch.cat([prefix, *mask], dim=1), prefix, deep)
        start, end = pictures.shape[1] - now, pictures.shape[1]
        return Fused(
            readout=x[:, -1],
            vision=Tokens(values=x[:, start:end], mask=vision.mask),
            language=Tokens(values=x[:, end : prefix.shape[1]], mask=language.mask),
            layers=layers,
            state=known,
        )

    def decode(
        self,
        x: Float[Tensor, "b n d"],
        present: Bool[Tensor, "b n"],
        prefix: Bool[Tensor, "b p"],
        deep: Float[Tensor, "b q e"],
    ) -> tuple[Float[Tensor, "b n d"], tuple[Tokens, ...]]:
        """What all tokens become, and those of the prefix behind each block. `deep` has what is added to the
        picture tokens, which stand first, behind the first blocks; e is 0 where nothing is."""
        place = torch.arange(x.shape[1], device=x.device)
        sees = place <= place[:, None]
        if not self.causal:
            sees = sees | (place < prefix.shape[1])
        x, behind = self.run(x, sees & present[:, None], present, deep)
        count = prefix.shape[1]
        return x, tuple(Tokens(values=one[:, :count], mask=prefix) for one in behind)

    def write(self, sequence: Written) -> Float[Tensor, "b n d"]:
        """What the tokens of a text become, and of an answer that is written causally."""
        sees, nothing = sequence.seen()[:, 0], sequence.values[:, :0, :0]
        return self.run(sequence.values, sees.tril() if self.causal else sees, sequence.mask, nothing)[0]

    def run(
        self,
        x: Float[Tensor, "b n d"],
        sees: Bool[Tensor, "b n n"],
        present: Bool[Tensor, "b n"],
        deep: Float[Tensor, "b q e"],
    ) -> tuple[Float[Tensor, "b n d"], list[Tensor]]:
        """What tokens become that see those on the last axis, and what they are behind each block."""
        decoder = self.decoder
        if (window := getattr(decoder.config, "sliding_window", None)) and x.shape[1] > window:
            raise UserError(
                f"{self.tower.config.key}: a token sees {window:,} in blocks of {self.tower.config.path}."
                f"\n  expected: at most so many\n  found: {x.shape[1]:,}\n  cure: fewer or smaller pictures"
            )
        # A softmax over nothing is NaN, so a masked token sees itself.
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        mask = (sees | itself)[:, None]
        if decoder.config._attn_implementation == "eager":  # which adds the mask
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        angles = decoder.rotary_emb(x, self.positions(present, deep.shape[1]))
        more = deep.split(self.width, dim=-1) if deep.shape[-1] else ()
        behind: list[Tensor] = []
        for number, block in enumerate(decoder.layers):
            x = kept = block(x, attention_mask=mask, position_embeddings=angles)
            if self.shares:
                x, kept = x
            elif number < len(more):
                x = kept = torch.cat([x[:, : deep.shape[1]] + more[number], x[:, deep.shape[1] :]], dim=1)
            behind.append(kept)
        return decoder.norm(x), behind

    def positions(self, present: Bool[Tensor, "b n"], pictures: int) -> Int[Tensor, "*3 b n"]:
        """The number of tokens that are there before each, the first so many of which are of pictures. In a
        grid a picture of g x g tokens takes g of them, and each token adds 0, its row and its column."""
        if not self.tower.facts.grid:
            return (present.cumsum(1) - 1).clamp(min=0) + self.tower.facts.first
        size, edge = self.tokens_per_view, math.isqrt(self.tokens_per_view)
        there = present[:, :pictures:size].long()
        place = torch.arange(size, device=present.device)
        inside = torch.stack([torch.zeros_like(place), place // edge, place % edge])
        begins = (there.cumsum(1) - there) * edge
        seen = (begins[None, :, :, None] + inside[:, None, None]).flatten(2)
        rest = (present[:, pictures:].cumsum(1) - 1).clamp(min=0) + there.sum(1, keepdim=True) * edge
        return torch.cat([seen, rest.expand(3, -1, -1)], dim=2)
