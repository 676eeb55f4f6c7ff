"""The FAST decoders: a small causal transformer, or a VLM, writes the chunk as a sequence of tokens."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor, nn

from tutti.distributed.world import world
from tutti.models.decoders.chunks import require_finite, require_fitted
from tutti.models.decoders.fast_tokens import PAD, ChunkTokens
from tutti.models.decoders.trunk import Cache, Conditioning, Trunk, TrunkConfig, shrink
from tutti.models.interfaces import ActionDecoder
from tutti.models.layers import RobotLinear, all_present, project
from tutti.types import Batch, DataSpec, Features, Robots, Tokens, UserError, at_least_float32

log = logging.getLogger("tutti.models")

Embed = Callable[[Tensor], Tensor]


class FastConfig(TrunkConfig):
    """`kind: fast`."""

    kind: Literal["fast"] = "fast"
    vocabulary_size: int = Field(default=256, ge=8, description="symbols and joined tokens together")
    scale: float = Field(
        default=10.0, gt=0, description="cosine coefficients are rounded to 1 / scale, in normalised units"
    )
    writer: Literal["own", "vlm"] = Field(
        default="own",
        description="own: a small transformer of the decoder's. vlm: the language model of model.vlm, in the "
        "last words of its vocabulary (pi0-FAST); width, depth, heads and cross_attention are not read.",
    )
    skip: int = Field(
        default=128, ge=0, description="writer: vlm leaves out so many words at the end of the vocabulary."
    )

    def build(self, spec: DataSpec, width: int) -> FastDecoder | VlmFastDecoder:
        """The decoder from features of `width` to chunks of (spec.horizon, spec.action_dim)."""
        return (FastDecoder if self.writer == "own" else VlmFastDecoder)(self, spec, width)


class WritingDecoder(ActionDecoder):
    """Next-token prediction on FAST tokens (2501.09747; `fast_tokens.py`).

    Token i is predicted from what was observed and from tokens 0 ... i - 1:

        e = 1 / n sum_{i < n} -log p(token_i | features, token_0 ... token_{i-1}),   at each of its actions

    Only tokens that still fit are possible: those that spell no more numbers than the chunk lacks. So the
    sequence ends by itself when t * a numbers are spelled, and there is no end token.

    `predict` takes the likeliest token each time, with the keys and values of the earlier ones kept, and
    stops at the longest sequence that `fit` found; numbers not spelled by then are 0, which are the
    highest frequencies.

    Masked steps past an episode's end hold the last present action of their dimension before the transform,
    so that the chunk stays smooth; the tokens that describe them count, as they cannot be told from the rest.

    Differs: FAST's loss is the mean over all tokens of the batch. Here a sample's mean stands at each of its
    actions, so the masked mean is that of the samples, weighted by their present actions.
    """

    needs_fit = True

    def __init__(self, config: FastConfig, spec: DataSpec) -> None:
        super().__init__()
        self.fitted = nn.Buffer(torch.tensor(False))
        self.tokens = ChunkTokens(spec.horizon, spec.action_dim, config.vocabulary_size, config.scale)

    @abstractmethod
    def scores(self, features: Features, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """The logits of each token given the ones before it."""

    @abstractmethod
    def written(self, features: Features) -> Int[Tensor, "b n"]:
        """The likeliest tokens, one after the other; -1 behind the end of a sequence."""

    def fit(self, actions: Float[Tensor, "n t a"], action_mask: Bool[Tensor, "n t a"]) -> None:
        """Learns the vocabulary and logs how short and exact its sequences are.

        Raises: UserError if the vocabulary cannot hold the integers that occur, or an action is not finite.
        """
        require_finite(actions, action_mask)
        chunks, has = hold_last(actions, action_mask), action_mask.any(dim=1)
        has = None if bool(has.all()) else has
        self.tokens.fit(chunks, has)
        self.fitted.fill_(True)
        log.info(
            "fast: %(symbols)d symbols and %(joined)d joined tokens; a chunk of %(numbers)d numbers takes "
            "%(tokens_per_chunk).1f tokens (at most %(longest)d), %(ratio).1f numbers a token; rounding "
            "costs %(rounding_l1).4f of L1",
            self.tokens.report(self.tokens.spread(chunks), None if has is None else self.tokens.spread(has)),
        )

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e = the sample's mean cross-entropy per token, in nats, at each of its actions.

        Raises: UserError before `fit`.
        """
        require_fitted(self, "fast")
        held = hold_last(batch.actions, batch.action_mask)
        tokens, lengths = self.tokens.encode(held, dimensions_of(features.robots))
        logits = at_least_float32(self.possible(self.scores(features, tokens), tokens, features.robots))
        error = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=PAD, reduction="none")
        mean = error.view_as(tokens).sum(1) / lengths
        return mean[:, None, None].expand_as(batch.actions)

    def possible(
        self, scores: Float[Tensor, "b n v"], tokens: Int[Tensor, "b n"], robots: Robots | None
    ) -> Float[Tensor, "b n v"]:
        """The scores; -inf where a token would spell too much."""
        spelled = self.tokens.lengths()
        before = F.pad(spelled[tokens[:, :-1].clamp(min=0)].cumsum(1), (1, 0))
        lacking = (self.tokens.numbers_of(dimensions_of(robots)) - before)[..., None]
        impossible = (spelled > lacking) & (tokens != PAD)[..., None]
        return scores.masked_fill(impossible, float("-inf"))

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        return self.tokens.decode(self.written(features), dimensions_of(features.robots))

    def likeliest(
        self, begin: Tensor, robots: Robots | None, follow: Callable[[Tensor, int], Tensor], embed: Embed
    ) -> Int[Tensor, "b n"]:
        """The likeliest tokens: `follow(x, place)` are the scores behind the embedded token x there."""
        x, spelled = begin, self.tokens.lengths()
        lacking = torch.zeros_like(x[:, :, 0], dtype=torch.int64)
        lacking = (lacking + self.tokens.numbers_of(dimensions_of(robots)))[:, 0]
        written: list[Tensor] = []
        # On the meta device, where no value can be read, as many tokens as there are numbers.
        longest = self.tokens.num_numbers if x.device.type == "meta" else int(self.tokens.longest)
        for place in range(longest):
            scores = follow(x, place)
            token = scores.masked_fill(spelled > lacking[:, None], float("-inf")).argmax(-1)
            written.append(torch.where(lacking > 0, token, PAD))
            lacking = torch.where(lacking > 0, lacking - spelled[token], lacking)
            # Of several ranks none may stop before the others, which would wait for it to gather weights.
            if all_present(lacking == 0) and world().ranks.count == 1:
                break
            x = embed(token)[:, None]
        return torch.stack(written, dim=1)


class FastDecoder(WritingDecoder):
    """A small causal transformer writes; its sequence begins with a linear map of the readout. In `predict`
    the keys and values of the earlier tokens are kept.

    Differs: FAST fine-tunes a large VLM, with the prompt in front and an end token behind.
    """

    def __init__(self, config: FastConfig, spec: DataSpec, width: int) -> None:
        super().__init__(config, spec)
        self.conditioning = Conditioning(config, width)
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.trunk = Trunk(config, self.tokens.num_numbers, causal=True)
        self.out = shrink(nn.Linear(config.width, config.vocabulary_size))

    def separate_robots(self, count: int) -> None:
        """A last layer for each of `count` robots, begun alike."""
        self.out = RobotLinear(self.out, count)

    def scores(self, features: Features, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """By the readout and, with cross-attention, the fused tokens."""
        condition = self.conditioning(features)
        x = torch.cat([condition.vector[:, None], self.embedding(tokens[:, :-1].clamp(min=0))], dim=1)
        return project(self.out, self.trunk(x, condition), condition.robots)

    def written(self, features: Features) -> Int[Tensor, "b n"]:
        """The likeliest tokens."""
        condition = self.conditioning(features)
        caches = [Cache() for _ in self.trunk.blocks]

        def follow(x: Tensor, place: int) -> Tensor:
            return project(self.out, self.trunk(x, condition, caches, first=place), condition.robots)[:, 0]

        return self.likeliest(condition.vector[:, None], condition.robots, follow, self.embedding)


class VlmFastDecoder(WritingDecoder):
    """The language model of a VLM writes actions as words of its own, in one sequence with what it was shown:

        [pictures; text; W readout; token_0 ... token_{n-1}],    token k is word V - 1 - skip - k of V

    Pictures and text are seen as in the fusion, what follows causally. Rows of the VLM's word embedding are
    input, those of its output layer output; nothing but W is new. p is among the words that stand for tokens
    and still fit.

    Source: pi0-FAST (2501.09747; openpi's `pi0_fast.py` and its tokenizer for V, skip and order). Differs:
    the readout, which has the state in it, stands where pi0-FAST has the state as text and "Action: "; there
    is no end token. In `predict` each token costs a whole pass.
    """

    def __init__(self, config: FastConfig, spec: DataSpec, width: int) -> None:
        super().__init__(config, spec)
        last = spec.vocab_size - 1 - config.skip
        if config.vocabulary_size > last + 1:
            raise UserError(
                f"model.action.vocabulary_size is {config.vocabulary_size}, but the VLM's tokenizer has "
                f"{spec.vocab_size:,} tokens, of which the last {config.skip} are left out.\n  expected: at "
                f"most {max(0, last + 1)}\n  cure: lower it, or model.action.skip"
            )
        self.words = nn.Buffer(last - torch.arange(config.vocabulary_size), persistent=False)
        self.begin = nn.Linear(width, width)
        # The VLM's language model: used, not registered.
        self.language: list[WordWriter] = []

    def write_by(self, language: object) -> None:
        """Raises: UserError unless it is the word embedding of a VLM that can write behind its pictures."""
        if not isinstance(language, WordWriter):
            raise UserError(
                "model.action.writer is vlm, but there is no model.vlm. Name one, or set "
                "model.action.writer=own."
            )
        language.require_words("model.action.writer")
        self.language = [language]

    def scores(self, features: Features, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n v"]:
        """By the whole sequence in one pass."""
        known = self._embedded(tokens[:, :-1].clamp(min=0))
        return self._follow(features, torch.cat([self._begun(features), known], dim=1))

    def written(self, features: Features) -> Int[Tensor, "b n"]:
        """The likeliest tokens."""
        whole: list[Tensor] = []

        def follow(x: Tensor, place: int) -> Tensor:
            whole.append(x)
            return self._follow(features, torch.cat(whole, dim=1))[:, -1]

        return self.likeliest(self._begun(features), features.robots, follow, self._embedded)

    def _begun(self, features: Features) -> Float[Tensor, "b 1 d"]:
        return self.begin(features.readout)[:, None]

    def _embedded(self, tokens: Int[Tensor, "*b"]) -> Float[Tensor, "*b d"]:
        return self.language[0].embedding(self.words[tokens])

    def _follow(self, features: Features, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        """The scores behind each of these tokens."""
        return self.language[0].behind(features.vision, features.language, x, self.words)


@runtime_checkable
class WordWriter(Protocol):
    """The language encoder of a VLM, as a decoder needs it that writes with it."""

    @property
    def embedding(self) -> Callable[[Tensor], Tensor]:
        """That of words."""
        ...

    def require_words(self, key: str) -> None:
        """Raises: UserError if it cannot, naming the `key` that asks for it."""
        ...

    def behind(
        self, vision: Tokens, words: Tokens, x: Float[Tensor, "b n d"], rows: Int[Tensor, " v"]
    ) -> Float[Tensor, "b n v"]:
        """The logits of these words behind embedded tokens that follow pictures and text causally."""
        ...


def dimensions_of(robots: Robots | None) -> Bool[Tensor, "b a"] | None:
    """The dimensions that each row's robot has; all of them where there is no robot, which counts nowhere."""
    has = None if robots is None else robots.action
    return None if has is None else has | ~has.any(dim=1, keepdim=True)


def hold_last(actions: Float[Tensor, "b t a"], mask: Bool[Tensor, "b t a"]) -> Float[Tensor, "b t a"]:
    """Each masked action becomes the last present one before it in its dimension; 0 where there is none."""
    steps = torch.arange(actions.shape[1], device=actions.device)[None, :, None]
    last = torch.where(mask, steps, -1).cummax(dim=1).values
    kept = torch.where(mask, actions, torch.zeros_like(actions))
    held = kept.gather(1, last.clamp(min=0))
    return torch.where(last < 0, torch.zeros_like(held), held)
