"""A pre-trained network in a model: built, trimmed, frozen or given factors, and strictly loaded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tutti.models.layers import make_repeated
from tutti.models.pretrained.config import (
    WEIGHTS_FILE,
    FolderConfig,
    LoraConfig,
    TextsConfig,
    TowerConfig,
    described,
    weights_hash,
)
from tutti.models.pretrained.convolutions import fix_batch_norms
from tutti.models.pretrained.facts import BEFORE, EXPERT, PI0, POLICY, WHOLE, WRITERS
from tutti.models.pretrained.hub import transformers
from tutti.models.pretrained.lora import LoraLinear
from tutti.models.pretrained.networks import built, persistent, without
from tutti.storage.reading import shown
from tutti.types import UserError

log = logging.getLogger("tutti.models")

EXAMPLES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What was read of a folder: the number of tensors, the names of those in it that nothing reads (shown by
    the first two parts of their names), and how many of the network's have not come from it, which only
    `training.init_from` allows."""

    kind: str
    path: Path
    tensors: int
    unread: tuple[str, ...]
    sha256: str
    lacking: int = 0

    def __str__(self) -> str:
        places = [*dict.fromkeys(".".join(name.split(".")[:2]) for name in self.unread)]
        names = ", ".join([*places[:EXAMPLES], *(["..."] if len(places) > EXAMPLES else [])])
        unread = f", {len(self.unread)} not read ({names})" if self.unread else ""
        missing = f"{self.lacking or 'none'} missing{unread}"
        tensors = "1 tensor" if self.tensors == 1 else f"{self.tensors} tensors"
        loaded = f"{self.kind} of {self.path}: {tensors} loaded, {missing}"
        return f"{loaded}; SHA-256 {self.sha256[:16]}"


Read = tuple[Mapping[str, Tensor], Collection[str]]
"""The tensors of a folder by the names of the network, and the names of the others in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A network in a tower, or the part of one that a socket takes: its names are those of the whole.

    `blocks` is the path to the list of what repeats in depth, "" where nothing does; `names` are all tensors
    that the parts have together, one set for all of them.
    """

    network: nn.Module
    blocks: str
    names: set[str] = field(default_factory=set)


class Tower(nn.Module):
    """The network of a tower's config with random weights, until `load`. It computes as in evaluation at all
    times: no dropout, no batch statistics, learning or not.

    What nothing reads is removed. With `learn` none or lora its own weights do not learn (`still`: none do),
    and unless they are random they are no part of a state dict: they are those of the folder. A state dict
    that holds them all the same, an export's, is taken.

    Raises: UserError if the config cannot be used.
    """

    def __init__(self, config: FolderConfig, part: Part | None = None) -> None:
        super().__init__()
        self.config, self.facts = config, config.facts()
        self.values = config.all_values()
        self.loaded: Loaded | None = None
        self.begun: Loaded | None = None  # what training.init_from has filled in, which learns from there
        self.filled = 0  # how often its weights were filled in, from the folder or a state dict
        self.still = config.learn == "none"
        self.in_folder = config.learn != "all" and config.weights == "pretrained"
        part = part or Part(network=self._trimmed(built(config)), blocks=self.facts.blocks)
        self.network, self.whole = part.network, part.names
        fix_batch_norms(self.network)
        if part.blocks:
            blocks = self.network.get_submodule(part.blocks)
            for block in blocks.children():
                make_repeated(block)
            if isinstance(config.learn, LoraConfig):
                self._add_factors(blocks, config.learn.lora)
        if config.learn != "all":
            for name, parameter in self.network.named_parameters():
                parameter.requires_grad_(name in self._factors())
        self.register_state_dict_post_hook(_without_folder)
        self.register_load_state_dict_pre_hook(_with_folder)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return super().train(False)

    def outside(self) -> dict[str, Tensor]:
        """The tensors, by name, that are in the folder and in no checkpoint."""
        if not self.in_folder:
            return {}
        factors = {f"network.{name}" for name in self._factors()}
        return {name: tensor for name, tensor in persistent(self) if name not in factors}

    def own(self) -> dict[str, Tensor]:
        """The tensors of the network, by name, without what LoRA adds."""
        return {name: t for name, t in persistent(self.network) if name not in self._factors()}

    def hidden(self, *inputs: Tensor, **named: Any) -> Tensor:
        """What is read of the network: its last hidden state, or several on the last axis, side by side."""
        if len(self.places) == 1:
            found = self.network(*inputs, **named)
            return found if isinstance(found, Tensor) else found.last_hidden_state
        found = self.network(*inputs, **named, output_hidden_states=True)
        deepest = max(self.places)
        # Behind the last block stands the output: whether hidden_states[-1] is normed differs by version.
        return torch.cat(
            [found.last_hidden_state if n == deepest else found.hidden_states[n] for n in self.places], dim=-1
        )

    def load(self, known: dict[str, Read] | None = None) -> Loaded:
        """Fills the network with the weights of the folder: all that it has, and none that is not known.
        Parts of one network hand on in `known` what has been read.

        Raises: UserError if a tensor is missing, left over, or of another shape, or the hash is another.
        """
        config, sha256 = self.config, weights_hash(self.config)
        known = {} if known is None else known
        if config.key not in known:
            known[config.key] = read_folder(config)
        found, others = known[config.key]
        own = self.own()
        _require(config, "lacks", [name for name in own if name not in found])
        _require(config, "has another shape of", [n for n, t in own.items() if t.shape != found[n].shape])
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(found[name])
        read = self.whole or own
        unread = tuple(sorted({*others, *(name for name in found if name not in read)}))
        kind = self.values["model_type"]
        self.filled += 1
        self.loaded = Loaded(kind=kind, path=config.path, tensors=len(own), unread=unread, sha256=sha256)
        log.info("%s: %s", config.key, self.loaded)
        return self.loaded

    def _trimmed(self, network: nn.Module) -> nn.Module:
        """Without what lies behind the layer that is read, and what no token depends on."""
        assert isinstance(self.config, TowerConfig)
        layers, facts = self.config.layers, self.facts
        holder, _, place = facts.blocks.rpartition(".")
        blocks = [*network.get_submodule(facts.blocks).children()]
        self.places = tuple(layer if layer >= 0 else len(blocks) + 1 + layer for layer in layers)
        wrong = [
            layer for layer, count in zip(layers, self.places, strict=True) if not 1 <= count <= len(blocks)
        ]
        if wrong:
            raise UserError(
                f"{self.config.key}.layer is {wrong[0]}, but the tower has {len(blocks)} blocks.\n  "
                f"expected: 1 to {len(blocks)}, or -{len(blocks)} to -1"
            )
        if len({*self.places}) < len(layers) or (len(layers) > 1 and facts.convolutional):
            why = "maps of different sizes" if facts.convolutional else "one of them twice"
            raise UserError(
                f"{self.config.key}.layer is {[*layers]}, {why}.\n  expected: one layer, or different ones"
            )
        setattr(network.get_submodule(holder), place, nn.ModuleList(blocks[: max(self.places)]))
        return without(network, (*facts.unread, *([facts.tail] if facts.tail and -1 not in layers else [])))

    def _add_factors(self, blocks: nn.Module, rank: int) -> None:
        linears = [module for module in blocks.modules() if type(module) is nn.Linear]
        if not linears:
            raise UserError(
                f"{self.config.key}.learn is lora, but a {self.values['model_type']} has no linear layers in "
                "its blocks. Set it to all or none."
            )
        with torch.random.fork_rng(devices=[]):  # so that what is built next is that of a run without LoRA
            for linear in linears:
                LoraLinear.over(linear, rank)

    def _factors(self) -> set[str]:
        """The names in the network of what LoRA adds."""
        layers = [name for name, one in self.network.named_modules() if isinstance(one, LoraLinear)]
        return {f"{name}.{factor}" for name in layers for factor in ("down", "up")}


def read_folder(config: FolderConfig) -> Read:
    """The tensors of its folder.

    Raises: UserError if some are missing, of another shape, or of nothing that is known.
    """
    folder, facts, values = config.folder, config.facts(), config.values()
    try:
        if not facts.network:
            return load_file(config.file(WEIGHTS_FILE)), ()
        library, pi0 = transformers(config.key), "action_expert" in values
        apart = isinstance(config, TextsConfig) and config.writes_apart()
        of, begin = (
            (PI0, WHOLE) if pi0 else (WRITERS[facts.socket], "model.") if apart else (facts.network, "")
        )
        network, info = getattr(library, of).from_pretrained(
            folder,
            config=described(library, values, whole=True),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # they are named below
            output_loading_info=True,
            **({"key_mapping": POLICY} if pi0 else {}),
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        said = shown(str(error), 600, quoted=False)
        raise UserError(f"{folder}: the weights cannot be loaded ({said}).") from error
    unread = unread_of(config)
    mismatched = [one[0] if isinstance(one, tuple) else str(one) for one in info["mismatched_keys"]]
    lacking = [name.removeprefix(begin) for name in info["missing_keys"]]
    _require(config, "lacks", [name for name in lacking if not name.startswith(unread or ("\0",))])
    _require(config, "has another shape of", mismatched)
    known = (*facts.others, *unread)
    _require(config, "has beside it", [n for n in info["unexpected_keys"] if not _begins(n, known)])
    found = {name.removeprefix(begin): tensor for name, tensor in network.state_dict().items()}
    return found, info["unexpected_keys"]


def unread_of(config: FolderConfig) -> tuple[str, ...]:
    """How the names of the tensors begin that no token depends on."""
    pi0 = "action_expert" in config.values()
    return (*config.facts().unread, *((f"{EXPERT}.embed_tokens",) if pi0 else ()))


def _require(config: FolderConfig, what: str, names: Collection[str]) -> None:
    """Raises: UserError if there are names."""
    if names:
        raise UserError(
            f"{config.path}: the file of weights {what} {len(names)} tensors, such as {sorted(names)[0]}.\n  "
            f"expected: the weights of the {config.values()['model_type']} that its config.json describes\n  "
            "cure: save the tower again by transformers' save_pretrained"
        )


def projection(config: TowerConfig, width: int) -> nn.Linear | None:
    """From several layers side by side to the width of one; None where one is read."""
    return nn.Linear(len(config.layers) * width, width) if len(config.layers) > 1 else None


def _begins(name: str, known: tuple[str, ...]) -> bool:
    """Whether a tensor of a file is of a known part, also under the name that a whole model gives it."""
    return any(name.removeprefix(before).startswith(known) for before in ("", *BEFORE))


def _without_folder(tower: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    assert isinstance(tower, Tower)
    for name in tower.outside():
        state.pop(prefix + name, None)


def _with_folder(tower: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    assert isinstance(tower, Tower)
    outside = tower.outside()
    # A state without those of the folder leaves them as they are, and what is remembered of them is right.
    tower.filled += not outside or any(prefix + name in state for name in outside)
    for name, tensor in outside.items():
        state.setdefault(prefix + name, tensor.detach())
