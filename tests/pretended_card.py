"""A pretended GPU for machines without one: tensors of the CPU that say, and are held to, where they lie.

Inside `Card()` a tensor made on "cuda", or moved there, is an ordinary tensor of the CPU with a mark on its
memory; its `device` is cuda:0. An operation that mixes marked and unmarked tensors fails as it would on a
GPU, and what makes the host wait for the device is written down in `waits`. Values are true ones: the results
are those of the CPU, to the last bit. Not seen: kernels that a GPU lacks, its other rounding, real streams.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tutti.training.device import Machine

DEVICE = torch.device("cuda", 0)
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "bincount")
"""Operations whose result, or its size, the host must know."""
COPIES = ("copy_", "_to_copy")
PLACED = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")
ALIKE = ("cat", "stack")
"""Operations that take no number of the host beside tensors of the device."""


class Card(TorchFunctionMode):
    """The pretended GPU. `waits`: what the host has waited for, in order, since the last `clear()` of it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._marks: dict[int, bool] = {}
        self._below = _Operations(self)
        self._fetching = False

    def __enter__(self) -> Card:
        self._below.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._below.__exit__(*error)

    def holds(self, tensor: Tensor) -> bool:
        """True if the tensor lies on the card."""
        return self._marks.get(tensor.untyped_storage()._cdata, False)

    def mark(self, tensor: Tensor, there: bool, *, new: bool = False) -> None:
        """Says where a tensor's memory lies; `new`: only if that is not known yet."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._marks:
            weakref.finalize(storage, self._marks.pop, key, None)
        elif new:
            return
        self._marks[key] = there

    def wait(self, why: str) -> None:
        """Writes down that the host waits; the numbers of one list are one wait."""
        if not self._fetching:
            self.waits.append(why)

    def moved(self, tensor: Tensor, there: bool, blocking: bool = True, **options: Any) -> Tensor:
        """The tensor on the card, or on the host."""
        if self.holds(tensor) == there:
            return tensor.to(**options) if options else tensor
        made = tensor.to(**{"dtype": tensor.dtype, **options, "copy": True})
        self.mark(made, there)
        if blocking:
            self.wait("to")
        return made

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if (special := _SPECIAL.get(func)) is not None:
            return special(self, func, args, options)
        if not _is_card(options.get("device")):
            return func(*args, **options)
        generator = options.get("generator")
        assert generator is None, f"{func.__name__} on the card with a generator of the host"
        made = func(*args, **{**options, "device": "cpu"})
        if func in (torch.tensor, torch.as_tensor) and not (
            isinstance(args[0], Tensor) and self.holds(args[0])
        ):
            self.wait(func.__name__)
        self.mark(made, True)
        return made

    def _device(self, func: Any, args: Any, options: Any) -> Any:
        return DEVICE if self.holds(args[0]) else func(*args)

    def _is_cuda(self, func: Any, args: Any, options: Any) -> bool:
        return self.holds(args[0])

    def _to(self, func: Any, args: Any, options: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        if rest and isinstance(rest[0], Tensor):
            there, given = self.holds(rest[0]), {"dtype": rest[0].dtype, **options}
            return self.moved(tensor, there, **given)
        device, dtype, _, layout = torch._C._nn._parse_to(
            *rest, **{k: v for k, v in options.items() if k != "copy"}
        )
        blocking = not (options.get("non_blocking") or (len(rest) > 1 and rest[-1] is True))
        there = self.holds(tensor) if device is None else _is_card(device)
        given = {"dtype": dtype, "memory_format": layout, "copy": options.get("copy")}
        # What goes to the host is read there next: without a wait it would be read too early.
        return self.moved(
            tensor, there, blocking or not there, **{k: v for k, v in given.items() if v is not None}
        )

    def _cpu(self, func: Any, args: Any, options: Any) -> Tensor:
        return self.moved(args[0], False)

    def _tolist(self, func: Any, args: Any, options: Any) -> Any:
        if self.holds(args[0]):
            self.wait("tolist")
        self._fetching = True
        try:
            return func(*args)
        finally:
            self._fetching = False

    def _numpy(self, func: Any, args: Any, options: Any) -> Any:
        assert not self.holds(args[0]), "a tensor of the card has no numpy array"
        return func(*args, **options)


class _Operations(TorchDispatchMode):
    """Looks at every operation, those of a backward pass too."""

    def __init__(self, card: Card) -> None:
        super().__init__()
        self.card = card

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in given if self.card.holds(tensor)]
        if there:
            self._look(func.overloadpacket.__name__, args, given, kwargs or {})
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self.card.mark(leaf, bool(there), new=True)
        return found

    def _look(self, name: str, args: tuple[Any, ...], given: list[Tensor], kwargs: dict[str, Any]) -> None:
        card = self.card
        here = [tensor for tensor in given if not card.holds(tensor)]
        if name in READS:
            card.wait(name)
        elif name in COPIES:
            if here and not (kwargs.get("non_blocking") or True in args[2:]):
                card.wait(name)
            return
        elif name in PLACED:
            indices = [one for one in args[1] if one is not None]
            alone = len(indices) == 1 and name != "index" and args[2].ndim == 0  # a mask and one number
            if any(one.dtype in (torch.bool, torch.uint8) for one in indices) and not alone:
                card.wait(f"{name} by a mask")
            if any(not card.holds(one) for one in indices):
                card.wait(f"{name} by numbers of the host")
                here = [tensor for tensor in here if not any(tensor is one for one in indices)]
        strange = [t for t in here if t.ndim or name in ALIKE or (name.endswith("_") and t is args[0])]
        if strange:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in strange)
            raise RuntimeError(f"{name} of tensors on the card with tensors of the host: {shapes}")


def _is_card(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


_SPECIAL: dict[Any, Callable[[Card, Any, Any, Any], Any]] = {
    Tensor.device.__get__: Card._device,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.is_cuda.__get__: Card._is_cuda,  # pyright: ignore[reportAttributeAccessIssue]
    Tensor.to: Card._to,
    Tensor.cpu: Card._cpu,
    Tensor.tolist: Card._tolist,
    Tensor.numpy: Card._numpy,
    Tensor.__array__: Card._numpy,
}


@contextmanager
def card(patch: pytest.MonkeyPatch) -> Iterator[Card]:
    """The pretended GPU, with what asks C++ for a device, and what needs a real one, put in its place."""
    grouped, autocast = torch._C._group_tensors_by_device_and_dtype, torch.autocast
    patch.setattr(Machine, "settle", lambda *_, **__: None)

    with Card() as made:

        def by_device(tensors: Any, with_indices: bool = False) -> Any:
            device = tensors[0][0].device
            return {(device, dtype): rest for (_, dtype), rest in grouped(tensors, with_indices).items()}

        patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", by_device)
        patch.setattr(torch, "autocast", lambda kind, *args, **given: autocast("cpu", *args, **given))
        yield made
