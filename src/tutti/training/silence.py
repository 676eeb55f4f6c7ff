"""One warning that DDP gives whatever one does, given where nobody hears it."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

NOTHING_UNUSED = b"find_unused_parameters=True was specified in DDP constructor, but did not find any unused"


def spend_warning(device: torch.device) -> None:
    """Has DDP say, unheard, that its search for unused parameters has found none.

    Torch 2.13 says so once in a process, from C++ straight to the file descriptor of stderr, so Python's
    `warnings` cannot hold it back. Here the first to be told is a module made for it. All ranks must call it.
    """
    module = DistributedDataParallel(
        nn.LayerNorm(1, device=device), find_unused_parameters=True, init_sync=False
    )
    with without_lines(NOTHING_UNUSED):
        module(torch.zeros(1, 1, device=device))


@contextmanager
def without_lines(text: bytes) -> Iterator[None]:
    """Inside the block nothing comes to stderr; afterwards all lines of it but those with `text` do."""
    if sys.__stderr__ is None:  # a service without one
        yield
        return
    sys.__stderr__.flush()
    with tempfile.TemporaryFile() as caught:
        kept = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.__stderr__.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            if others := b"".join(line for line in caught if text not in line):
                os.write(2, others)
