"""A folder of tensors that many processes have written and any number can read.

The format is that of torch.distributed.checkpoint: `.metadata`, which says where each part of each tensor
lies, and one file for each process that wrote. A process writes the shares that it holds; what several hold
in equal form is written once, the work divided among them. `.metadata` is a pickle, as that library has it:
open only folders of people whom you trust (`tutti export` makes safetensors of one).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from tutti.types import UserError

FOLDER = "shards"
"""The name that such a folder has in a checkpoint."""
INDEX = ".metadata"

# The library's remark that one process is alone, which is meant so here. Not in a `catch_warnings`: that is
# not for threads, and checkpoints are written in one.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class _Writer(FileSystemWriter):
    """Says an error of the disk as such: torch's file writer hides it behind "unexpected pos"."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        """As the library has it.

        Raises: OSError for what went wrong with the disk.
        """
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise _of_the_disk(error) from error


def write(folder: Path, tensors: Mapping[str, Tensor], group: Any = None) -> None:
    """Writes the tensors into `folder`, and what is written to the disk itself.

    Every process of `group` must call it with the same names: a DTensor is this process's share of a tensor,
    any other tensor is held by all in equal form. Without a group this process is alone.

    Raises: OSError if it cannot be written, on every process.
    """
    writer = _Writer(folder, sync_files=True, overwrite=True)
    try:
        save(dict(tensors), storage_writer=writer, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        cause = _cause(error)
        raise cause if isinstance(cause, OSError) else OSError(str(cause)) from error
    except RuntimeError as error:
        raise _of_the_disk(error) from error


def files_of(folder: Path, rank: int) -> list[Path]:
    """The files that process `rank` has written, the index counting as the first one's."""
    own = sorted(folder.glob(f"__{rank}_*"))
    return [folder / INDEX, *own] if rank == 0 else own


def read(folder: Path, forms: Mapping[str, Tensor] | None = None, *, below: str = "") -> dict[str, Tensor]:
    """The tensors whose names begin with `below`: whole and on the CPU, or this process's shares of them.

    Where `forms` has a DTensor of the same size under a tensor's name, or under the name up to its last "/",
    only the share is read that this process holds of that one. No process waits for another.

    Raises: UserError if the folder is missing or damaged.
    """
    try:
        reader = FileSystemReader(folder)
        found = reader.read_metadata().state_dict_metadata
        tensors: dict[str, Tensor] = {
            name: _room(name, entry, forms or {})
            for name, entry in found.items()
            if name.startswith(below) and isinstance(entry, TensorStorageMetadata)
        }
        if tensors:
            load(dict(tensors), storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # whatever a damaged pickle or zip leads to
        cause = _cause(error) if isinstance(error, CheckpointException) else error
        raise UserError(
            f"{folder}: these weights cannot be read, files are missing or damaged ({cause})."
        ) from error
    return tensors


def sets(folder: Path) -> set[str]:
    """The first parts, up to "/", of the tensors' names.

    Raises: UserError if the folder is missing or damaged.
    """
    try:
        return {name.split("/")[0] for name in FileSystemReader(folder).read_metadata().state_dict_metadata}
    except Exception as error:
        raise UserError(f"{folder / INDEX}: missing or damaged ({error}).") from error


def _room(name: str, entry: TensorStorageMetadata, forms: Mapping[str, Tensor]) -> Tensor:
    """An empty tensor to read into."""
    form = forms.get(name, forms.get(name.rpartition("/")[0]))
    if isinstance(form, DTensor) and form.shape == entry.size:
        return torch.empty_like(form.detach(), dtype=entry.properties.dtype)
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def _of_the_disk(error: BaseException) -> OSError:
    """The error of the disk during which `error` arose, or one with the same text."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return OSError(str(error))


def _cause(error: CheckpointException) -> BaseException:
    """What has gone wrong on the first rank that says so.

    Raises: KeyboardInterrupt or SystemExit if it was that, which the library wraps like any error.
    """
    for failure in error.failures.values():
        cause = failure[0]
        if isinstance(cause, KeyboardInterrupt | SystemExit):
            raise cause from error
    return next(iter(error.failures.values()))[0]
