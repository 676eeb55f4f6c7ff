"""What DDP says on stderr of every rank: not that its search for unused parameters found none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fixtures.ranks import on_ranks
from fixtures.ranks_training import train
from tutti.training.silence import NOTHING_UNUSED, spend_warning, without_lines


def heard(action: Callable[[], object]) -> str:
    """All that comes to the file descriptor of stderr meanwhile."""
    with tempfile.TemporaryFile() as caught:
        kept = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            action()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        caught.seek(0)
        return caught.read().decode()


def of_training(run: str) -> str:
    changes = {"steps": 3, "validate_every": 0, "parallel": {"kind": "ddp"}}
    return heard(lambda: train(run, changes))


def of_plain_ddp(spent: bool) -> str:
    if spent:
        spend_warning(torch.device("cpu"))
    module = DistributedDataParallel(nn.LayerNorm(2), find_unused_parameters=True)
    return heard(lambda: module(torch.ones(1, 2)))


def test_a_training_does_not_say_it_on_any_rank(tmp_path: Path) -> None:
    for said in on_ranks(2, of_training, str(tmp_path)):
        assert "find_unused_parameters" not in said


def test_without_the_silence_it_would_be_said() -> None:
    assert all(NOTHING_UNUSED.decode() in said for said in on_ranks(2, of_plain_ddp, False))
    assert not any(NOTHING_UNUSED.decode() in said for said in on_ranks(2, of_plain_ddp, True))


def test_everything_else_that_is_written_meanwhile_gets_through(capfd: pytest.CaptureFixture[str]) -> None:
    with without_lines(b"one thing"):
        os.write(2, b"a line with one thing\nand another\n")
        assert capfd.readouterr().err == ""
    assert capfd.readouterr().err == "and another\n"
