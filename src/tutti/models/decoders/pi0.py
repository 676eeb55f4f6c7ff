"""The pi0 decoder: an action expert that shares keys and values with a VLM, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from tutti.models.decoders.chunks import own_dimensions
from tutti.models.decoders.denoising import FlowDecoder, NoiseConfig
from tutti.models.decoders.trunk import (
    PERIODS,
    ChunkNetwork,
    Condition,
    Conditioner,
    Memory,
    level_waves,
    shrink,
)
from tutti.models.interfaces import ActionDecoder, Fusion
from tutti.models.pretrained.config import FolderConfig
from tutti.models.pretrained.networks import drawn, persistent, without
from tutti.models.pretrained.tower import Part, Tower
from tutti.models.pretrained.vlm import VlmFusion
from tutti.types import Batch, DataSpec, Features, UserError

DECODERS = ("gemma", "llama")
"""The language models whose blocks an expert is known to be built of."""


class Pi0Config(NoiseConfig):
    """`kind: pi0`."""

    kind: Literal["pi0"]
    draws: PositiveInt = Field(
        default=1, description="noise levels and noises drawn for each sample of a training batch"
    )
    steps: int = Field(default=10, ge=1, le=1000, description="Euler steps of a prediction")
    width: PositiveInt | Literal["auto"] = Field(
        default="auto",
        description="Width of the expert; auto: that of the checkpoint in pi0's format which model.vlm "
        "names, else half of the VLM's.",
    )
    hidden: PositiveInt | Literal["auto"] = Field(
        default="auto", description="Hidden width of its MLPs; auto: that of the checkpoint, else 4 x width."
    )

    def build(self, spec: DataSpec, fusion: Fusion) -> Pi0Decoder:
        """The decoder that reads the keys and values of `fusion`, which gives them from now on.

        Raises: UserError unless that is a VLM which can share them, and state and actions fit.
        """
        if not isinstance(fusion, VlmFusion):
            raise UserError(
                "model.action.kind is pi0, whose expert shares keys and values with a VLM, and there is no "
                "model.vlm. Name one, or set model.action.kind=flow."
            )
        return Pi0Decoder(self, spec, fusion)


class Pi0Decoder(ActionDecoder):
    """Flow matching by pi0's expert (2410.24164), in the layout of transformers' `PI0`.

    The expert is a Gemma (beside SmolVLM: a Llama) of as many blocks as the VLM, with its heads and a width
    of its own, over [state; a_1 ... a_t]. In block i its queries attend to the keys and values that block i
    of the VLM made of pictures and text, behind which its own stand: the state sees those and itself, the
    actions see all, and the VLM sees nothing of it. An action enters as

        W_2 silu(W_1 [W a; sin, cos of the noise level])

    Levels, path and error are those of `FlowDecoder`, with pi0's t = 1 - u and its velocity -v. A checkpoint
    in pi0's format may have more dimensions than state and actions: both are filled up with 0, the noise is
    drawn for all of its dimensions, and the error counts in those that there are (as in lerobot).

    `stop_gradient: [fused]` on the action's term stops the gradient at the keys and values: none reaches the
    VLM (2505.23705). Its readout, last norm and, of its last block, all but keys and values serve other terms
    only. Of a history the expert reads the pictures, not the earlier states.

    Differs: openpi fills the end of a cut chunk with its last action; here a masked action is pure noise.

    Raises: UserError if the VLM cannot share keys and values, or state and actions do not fit.
    """

    def __init__(self, config: Pi0Config, spec: DataSpec, fusion: VlmFusion) -> None:
        super().__init__()
        vlm = fusion.tower.config
        said: dict[str, Any] = fusion.tower.values.get("action_expert") or {}
        expert = _expert(config, vlm, fusion, said, spec)
        given: dict[str, Any] = {"learn": "all"} if said else {"learn": "all", "weights": "random"}
        fusion.tower.whole.update(name for name, _ in persistent(expert))
        part = Part(network=expert, blocks="model.dit.layers", names=fusion.tower.whole)
        self.tower = Tower(vlm.model_copy(update=given), part)
        self.action_dim = spec.action_dim
        embed: Any = expert.get_submodule("embed_action_time")
        self.sizes = embed.state_proj.in_features, embed.action_in_proj.in_features
        self.width, self.depth = embed.state_proj.out_features, fusion.depth
        shape = spec.horizon, self.sizes[1]
        periods = float(said.get("min_period", PERIODS[0])), float(said.get("max_period", PERIODS[1]))
        self.more = shape[1] - spec.action_dim
        heads = fusion.decoder.config.num_key_value_heads
        conditioning = Pi0Conditioning(heads, self.sizes[0], self.more)
        parts = conditioning, Pi0Expert(expert, periods, fusion.tower.facts.first)
        self.flow = FlowDecoder(config, shape, *parts, steps=config.steps)
        fusion.share()

    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """e of the dimensions that there are."""
        actions, mask = (
            F.pad(batch.actions, (0, self.more)),
            F.pad(batch.action_mask, (0, self.more), value=True),
        )
        wide = replace(batch, actions=actions, action_mask=mask)
        return self.flow(features, wide)[..., : self.action_dim]

    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised."""
        return self.flow.predict(features)[..., : self.action_dim]

    def predict_continuing(
        self,
        features: Features,
        target: Float[Tensor, "t a"],
        weights: Float[Tensor, " t"],
        guidance: float,
    ) -> Float[Tensor, "b t a"]:
        """As the flow decoder, drawn to 0 in the dimensions that the checkpoint has besides."""
        target = F.pad(target, (0, self.more))
        found = self.flow.predict_continuing(features, target, weights, guidance)
        return found[..., : self.action_dim]


class Pi0Conditioning(Conditioner):
    """The state, filled up with 0, as the vector; by block the VLM's keys and values of pictures and text."""

    def __init__(self, heads: int, state_dim: int, more: int) -> None:
        super().__init__()
        self.heads, self.state_dim, self.more = heads, state_dim, more

    def forward(self, features: Features) -> Condition:
        """The state as the vector, and a memory for each block."""
        state, robots = features.state, features.robots
        assert state is not None
        if robots is not None and robots.action is not None:
            robots = replace(robots, action=F.pad(robots.action, (0, self.more), value=True))
        memories: list[Memory] = []
        for layer in features.layers:
            both = layer.values.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            keys, values = both.chunk(2, dim=-1)
            memories.append(Memory(keys=keys, values=values, mask=layer.mask[:, None, None]))
        state = F.pad(state, (0, self.state_dim - state.shape[1]))
        return Condition(vector=state, memories=tuple(memories), robots=robots)


class Pi0Expert(ChunkNetwork):
    """One token for the state, one a step of the chunk, through the expert's blocks; its velocity, negated.

    The network belongs to the decoder's tower: used, not registered.
    """

    def __init__(self, expert: nn.Module, periods: tuple[float, float], first: int) -> None:
        super().__init__()
        self.expert, self.periods, self.first = [expert], periods, first

    def forward(
        self, chunk: Float[Tensor, "b t a"], level: Float[Tensor, " b"], condition: Condition
    ) -> Float[Tensor, "b t a"]:
        """v at u = `level`, which is pi0's time 1 - u."""
        network: Any = self.expert[0]
        embed, dit = network.embed_action_time, network.model.dit
        steps = embed.action_in_proj(own_dimensions(chunk, condition.robots))
        waves = level_waves(1 - level, steps.shape[-1], self.periods).to(steps.dtype)
        steps = torch.cat([steps, waves[:, None].expand_as(steps)], dim=-1)
        steps = embed.action_time_mlp_out(F.silu(embed.action_time_mlp_in(steps)))
        x = torch.cat([embed.state_proj(condition.vector)[:, None], steps], dim=1)
        (memory, *_), count = condition.memories, x.shape[1]
        assert memory is not None and memory.mask is not None
        own = torch.ones(count, count, dtype=torch.bool, device=x.device)
        own[0, 1:] = False  # the state does not see the actions
        before = memory.mask.expand(-1, 1, count, -1)
        mask = torch.cat([before, own.expand(len(x), 1, -1, -1)], dim=-1)
        places = torch.arange(count, device=x.device) + memory.mask.flatten(1).sum(1, keepdim=True)
        angles = dit.rotary_emb(x, places + self.first)
        for block, memory in zip(dit.layers, condition.memories, strict=True):
            x = block(x, attention_mask=mask, position_embeddings=angles, past_key_values=Shared(memory))
        return -network.action_out_proj(dit.norm(x[:, 1:]))


class Shared:
    """What a block of transformers takes for a cache: keys and values that stand before its own."""

    def __init__(self, memory: Memory | None) -> None:
        assert memory is not None
        self.keys, self.values = memory.keys, memory.values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **_named: Any) -> tuple[Tensor, Tensor]:
        """All of them, (b, k, n, e)."""
        return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)


def _expert(
    config: Pi0Config, vlm: FolderConfig, fusion: VlmFusion, said: dict[str, Any], spec: DataSpec
) -> nn.Module:
    """The network with the names that transformers' own has: that of the checkpoint, or a new one."""
    sizes, dims = _sizes(config, vlm, fusion, said, spec)
    width = sizes["hidden_size"]

    def made(library: Any) -> nn.Module:
        return library.AutoModel.from_config(library.AutoConfig.for_model(**sizes))

    linears = {
        "embed_action_time.state_proj": nn.Linear(dims[0], width),
        "embed_action_time.action_in_proj": nn.Linear(dims[1], width),
        "embed_action_time.action_time_mlp_in": nn.Linear(2 * width, width),
        "embed_action_time.action_time_mlp_out": nn.Linear(width, width),
        "action_out_proj": shrink(nn.Linear(width, dims[1])),
    }
    root = nn.Module()
    for name in ("model", "embed_action_time"):
        root.add_module(name, nn.Module())
    for path, part in ({"model.dit": without(drawn(vlm, made), ("embed_tokens",))} | linears).items():
        root.set_submodule(path, part)
    return root


def _sizes(
    config: Pi0Config, vlm: FolderConfig, fusion: VlmFusion, said: dict[str, Any], spec: DataSpec
) -> tuple[dict[str, Any], tuple[int, int]]:
    """The config of the expert's blocks, and how many dimensions of state and actions it has.

    Raises: UserError if the VLM cannot share keys and values, or state and actions do not fit.
    """
    own = fusion.decoder.config.to_dict()
    if own["model_type"] not in DECODERS or fusion.tower.facts.grid:
        raise UserError(
            f"model.action.kind is pi0, but the language model of {vlm.path} is a {own['model_type']}.\n  "
            f"expected: {' or '.join(DECODERS)}, as of PaliGemma and SmolVLM\n  cure: model.action.kind=flow "
            "with model.action.cross_attention=layers"
        )
    heads = {name: own[name] for name in ("num_key_value_heads", "head_dim")}
    if not said:
        width = own["hidden_size"] // 2 if config.width == "auto" else config.width
        hidden = 4 * width if config.hidden == "auto" else config.hidden
        sizes, dims = {"hidden_size": width, "intermediate_size": hidden}, (spec.state_dim, spec.action_dim)
    else:
        own = sizes = said["dit_config"]
        dims = int(said.get("max_state_dim", 32)), int(said.get("max_action_dim", 32))
        theirs = {name: own[name] for name in heads}
        if heads != theirs or own["num_hidden_layers"] < fusion.depth:
            raise UserError(
                f"{vlm.path}: its expert has {own['num_hidden_layers']} blocks with {theirs}.\n  expected: "
                f"at least {fusion.depth} with {heads}, as its VLM"
            )
        for key, asked, found in (
            ("width", config.width, own["hidden_size"]),
            ("hidden", config.hidden, own["intermediate_size"]),
        ):
            if asked not in ("auto", found):
                raise UserError(
                    f"model.action.{key} is {asked}, but the expert of {vlm.path} has {found}.\n  expected: "
                    "auto"
                )
    for name, here, most in (("states", spec.state_dim, dims[0]), ("actions", spec.action_dim, dims[1])):
        if here > most:
            raise UserError(
                f"The data's {name} have {here} dimensions, those of the expert of {vlm.path} {most}.\n  "
                "cure: fewer of them, or a model.vlm.path without an expert, beside which a new one learns"
            )
    left_out = {"vocab_size": 1, "pad_token_id": None, "num_hidden_layers": fusion.depth}
    return {**own, **heads, **sizes, **left_out}, (max(1, dims[0]), dims[1])
