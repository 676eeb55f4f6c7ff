"""A vision-language model on 1 and 2 processes: DDP and FSDP give the losses and weights of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from fixtures.ranks import on_ranks
from fixtures.ranks_training import TOLERANCE, furthest, require_same_records, train
from fixtures.vla_training import make_batch
from fixtures.vlms import config_of
from tutti.types import Batch

AT_THE_END = {"steps": 3, "validation": {"every": 0}, "checkpoints": {"every": 0}}
BY_BLOCK = {"activation_checkpointing": "block"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None, dict[str, Any]]] = {
    # the VLM, its keys, those of the answer's term, those of the training
    "all": ("paligemma", {}, {}, BY_BLOCK | {"accumulation": 2}),
    "held": ("paligemma", {}, {"stop_gradient": ["language", "fused"]}, {}),
    "words": ("paligemma", {}, {}, BY_BLOCK),
    "pi0": ("paligemma", {}, {}, BY_BLOCK),
    "lora": ("smolvlm", {"learn": {"lora": 2}, "mask": "causal"}, None, BY_BLOCK),
}


FLOW = {"kind": "flow", "width": 8, "depth": 2, "heads": 2, "cross_attention": "layers"}
SHARED = {"kind": "pi0", "width": 12, "draws": 2}
WORDS = {"kind": "fast", "writer": "vlm", "vocabulary_size": 14, "skip": 3, "scale": 1.0}


def sections_of(case: str) -> dict[str, Any]:
    """A VLM from scratch, described without a folder, with a decoder that reads each of its layers or shares
    their keys and values, or whose actions are words of the VLM."""
    kind, keys, answer, _ = CASES[case]
    described = config_of(kind).to_dict()
    vlm = {"path": "none", "weights": "random", "architecture": described, **keys}
    action = {"words": WORDS, "pi0": SHARED}.get(case, FLOW)
    recon = {"width": 16, "heads": 2, "downsample": 2, "weight": 0.1}
    objective: dict[str, Any] = {"align": None, "state": None, "recon": recon, "action": {"weight": 1.0}}
    if answer is not None:
        objective["answer"] = {"kind": "next_token", "weight": 0.3, **answer}
    return {"model": {"vlm": vlm, "action": action}, "objective": objective}


def with_answers(number: int, size: int) -> Batch:
    """The rows of the second of two ranks have no answer."""
    random = torch.Generator().manual_seed(number)
    lengths = torch.arange(size) % 4 * (torch.arange(size) < size // 2)
    answers = torch.randint(0, 20, (size, 8), generator=random)
    return replace(make_batch(number, size), answer=answers, answer_mask=torch.arange(8) < lengths[:, None])


def train_cases(folder: str, section: dict[str, Any]) -> dict[str, Any]:
    """All trainings in one world."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fixtures.ranks_training.make_batch", with_answers)
        for case in CASES:
            given = {**AT_THE_END, **CASES[case][-1], **section}
            found[case] = train(f"{folder}/{case}", given, sections_of(case))
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    @cache
    def on(kind: str) -> dict[str, Any]:
        section = {} if kind == "one" else {"parallel": {"kind": kind}}
        count = 1 if kind == "one" else 2
        return on_ranks(count, train_cases, str(tmp_path_factory.mktemp(kind)), section)[0]

    return on


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_train_a_vlm_as_one_process(kind: str, trained: Callable[[str], dict[str, Any]]) -> None:
    """Whole and with LoRA, with blocks that are kept or recomputed, and a rank whose rows have no answers."""
    one, two = trained("one"), trained(kind)
    for case in CASES:
        require_same_records(one[case]["records"], two[case]["records"])
        assert furthest(one[case]["tensors"], two[case]["tensors"]) < TOLERANCE, case
