"""Networks of transformers with random weights: built from a config.json, their tensors, parts taken out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tutti.models.pretrained.config import FolderConfig, TextsConfig, described
from tutti.models.pretrained.convolutions import EfficientNetLite0
from tutti.models.pretrained.facts import OUTPUT
from tutti.models.pretrained.hub import transformers
from tutti.storage.reading import shown
from tutti.types import UserError

MOST_BLOCKS, DEPTHS = 512, ("num_hidden_layers", "num_layers", "n_layers", "depth")


def built(config: FolderConfig) -> nn.Module:
    """The whole network that a folder's config describes, with random weights.

    Raises: UserError if it cannot be used.
    """
    values, facts = config.values(), config.facts()
    if not facts.network:
        return EfficientNetLite0()
    deepest = _deepest(values)
    if deepest > MOST_BLOCKS:
        raise UserError(
            f"{config.key}: the config.json of {config.path} asks for {shown(deepest)} blocks; "
            f"expected at most {MOST_BLOCKS}."
        )

    def made(library: ModuleType) -> nn.Module:
        asked = described(library, values)
        for one in (asked, *(getattr(asked, name) for name in asked.sub_configs)):
            if getattr(one, "attn_logit_softcapping", None):  # Gemma 2's, which torch's attention lacks
                one._attn_implementation = "eager"
        return getattr(library, facts.network)(asked)

    network = drawn(config, made)
    if isinstance(config, TextsConfig) and config.writes_apart():
        words = network.get_input_embeddings()
        network.add_module(OUTPUT, nn.Linear(words.embedding_dim, words.num_embeddings, bias=False))
    return network


def drawn(config: FolderConfig, made: Callable[[ModuleType], Any]) -> Any:
    """A network of transformers with random weights, or with sizes alone where tensors have no values.

    Raises: UserError if it cannot be used.
    """
    library, like = transformers(config.key), torch.empty(0)
    sizes_alone = like.is_meta or isinstance(like, FakeTensor)
    try:
        # Some of its initialisations look at what they have drawn, which here has no values.
        empty = import_module("transformers.initialization").no_init_weights
        with empty() if sizes_alone else nullcontext():
            network = made(library)
        if sizes_alone:
            network.tie_weights()
        # DINOv3 keeps positions for all networks of a process: those of fake tensors would come back.
        code = import_module(type(network).__module__)
        if kept := getattr(code, "get_patches_center_coordinates", None):
            code.get_patches_center_coordinates = getattr(kept, "__wrapped__", kept)  # pyright: ignore
        return network
    except (ValueError, TypeError, LookupError, AttributeError, ImportError, RuntimeError) as error:
        raise UserError(
            f"{config.key}: the config.json of {config.path} cannot be used "
            f"({shown(str(error), 300, quoted=False)})."
        ) from error


def output_of(network: nn.Module, embedding: Any) -> Tensor:
    """The matrix of the output layer, a row a word: its own, or that of the word embedding."""
    layer: Any = network._modules.get(OUTPUT, embedding)
    return layer.weight


def persistent(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by every name that a state dict would have."""
    for path, one in module.named_modules(remove_duplicate=False):
        for name, tensor in {**one._parameters, **one._buffers}.items():
            if tensor is not None and name not in one._non_persistent_buffers_set:
                yield (f"{path}.{name}" if path else name), tensor


def without(network: nn.Module, paths: Collection[str]) -> nn.Module:
    """The network without the modules and parameters at `paths`: nothing reads them."""
    for path in paths:
        holder, _, place = path.rpartition(".")
        parent = network.get_submodule(holder)
        setattr(parent, place, nn.Identity() if place in parent._modules else None)
    return network


def _deepest(values: Any) -> int:
    """The most blocks that a config asks for, at any depth of it."""
    if not isinstance(values, Mapping):
        return 0
    own = [MOST_BLOCKS + 1 if not isinstance(n, int) else n for key in DEPTHS if (n := values.get(key))]
    return max([0, *own, *map(_deepest, values.values())])
