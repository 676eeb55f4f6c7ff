"""One training on 1, 2 and 4 processes: the same losses, weights that go on anywhere, faults stop all."""

from __future__ import annotations

import errno
import itertools
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.checkpoints import load_latest
from fixtures.ranks import on_ranks
from fixtures.ranks_training import (
    SIZE,
    TOLERANCE,
    Data,
    furthest,
    require_same_records,
    tensors_of,
    train,
    trainer_of,
)
from fixtures.vla_training import make_batch
from tutti.config.run_config import RunConfig
from tutti.distributed.ranks import current_ranks
from tutti.distributed.world import world
from tutti.training.faults.non_finite import NonFiniteError
from tutti.training.faults.saved_steps import load_step
from tutti.types import UserError

TWO_PHASES = {
    "strategy": {
        "kind": "phases",
        "list": [
            {"name": "look", "share": 1, "exclude_terms": ["action"], "learning_rates": {"fusion": 0}},
            {"name": "act", "share": 2, "learning_rates": {"vision": 0}},
        ],
    }
}
K_GRADIENTS = {"backward": {"kind": "k_gradients", "aggregator": {"kind": "mgda"}}}
MASKED = {"backward": {"kind": "masked", "may_train": {"recon": ["vision"], "action": ["fusion", "action"]}}}
SHARES = {"balancing": {"kind": "gradient_share", "start": 2, "steps": 1}}
FAMO = {"balancing": {"kind": "famo", "bounds": {"align": -1.0}}}
MUON = {"optimizer": {"kind": "muon"}}
CONSTANT = {"kind": "constant", "warmup": 1}
SCHEDULE_FREE = {"optimizer": {"kind": "schedule_free"}, "ema": "off", "schedule": CONSTANT}
BY_PART = {"gradients": {"clip_norm": 0.1, "clip_by": "part"}, "activation_checkpointing": "block"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, {}, ("ddp2", "fsdp2", "ddp4", "fsdp4")),
    "accumulation": ({"accumulation": 2, **MUON}, {}, ("ddp2", "fsdp2")),
    "adamw": ({"accumulation": 2}, {}, ()),
    "phases": ({"steps": 6, "schedule": {"kind": "wsd", "warmup": 1}}, TWO_PHASES, ("ddp2", "fsdp2")),
    "famo": ({}, FAMO, ("ddp2", "fsdp2")),
    "schedule_free": (SCHEDULE_FREE, {}, ("ddp2", "fsdp2")),
    "by_part": (BY_PART, {}, ("ddp2", "fsdp2")),
    "k_gradients": ({"accumulation": 2}, K_GRADIENTS, ("ddp2",)),
    "masked": ({"accumulation": 2}, MASKED, ("ddp2",)),
    "gradient_share": ({}, SHARES, ("ddp2",)),
}


def spread(kind: str) -> tuple[int, dict[str, Any]]:
    """ "fsdp4" as a number of ranks and a section of a config; "one" is one process."""
    return (1, {}) if kind == "one" else (int(kind[-1]), {"parallel": {"kind": kind[:-1]}})


def train_cases(folder: str, section: dict[str, Any], cases: list[str]) -> dict[str, Any]:
    """All these trainings in one world, since it takes longer to make one than to train."""
    found: dict[str, Any] = {}
    for case in cases:
        changes, sections, _ = CASES[case]
        found[case] = train(f"{folder}/{case}", {"steps": 4, **changes, **section}, sections)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[dict[str, Any]]]:
    """What the cases of a kind ("one", "ddp2") give, on each rank."""

    @cache
    def on(kind: str) -> list[dict[str, Any]]:
        count, section = spread(kind)
        cases = [case for case, given in CASES.items() if kind in ("one", *given[2])]
        return on_ranks(count, train_cases, str(tmp_path_factory.mktemp(kind)), section, cases)

    return on


PAIRS = [(case, kind) for case, given in CASES.items() for kind in given[2]]
MOVES = [("one", "fsdp2"), ("fsdp2", "one"), ("fsdp2", "ddp4"), ("ddp4", "fsdp2")]
OPTIMIZERS = {"accumulation": MUON, "adamw": {}}
FORMS = ("whole", "sharded")


@pytest.mark.parametrize(("case", "kind"), PAIRS)
def test_the_same_losses_and_weights_as_one_process(case: str, kind: str, trained: Any) -> None:
    (one,), several = trained("one"), trained(kind)
    expected, found = one[case], several[0][case]
    require_same_records(expected["records"], found["records"])
    assert furthest(expected["tensors"], found["tensors"]) < TOLERANCE
    for other in several[1:]:  # what the others read back is what the first has written
        assert furthest(found["tensors"], other[case]["tensors"]) == 0
    assert torch.equal(found["rng"]["torch"], expected["rng"]["torch"])


def train_forms(folder: str, section: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Every optimizer with every form of checkpoints, in one world."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for case, form in itertools.product(OPTIMIZERS, FORMS):
        settings = {"steps": 4, "accumulation": 2, "checkpoints": {"every": 2, "format": form}}
        found[case, form] = train(f"{folder}/{case}-{form}", settings | OPTIMIZERS[case] | section)
    return found


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, str]], dict[Any, Any]]:
    """What trainings give that two kinds share: the first to step 2, the other from its checkpoint on."""

    def shares(folder: Path, count: int) -> None:
        for case, form in itertools.product(OPTIMIZERS, FORMS):
            last = folder / f"{case}-{form}" / "checkpoints" / "step-000004"
            wrote = {path.name for path in (last / "shards").glob("rank-*")}
            expected = {f"rank-{rank:05d}.safetensors" for rank in range(count)}
            assert wrote == (expected if form == "sharded" else set())

    @cache
    def before(kind: str) -> Path:
        count, section = spread(kind)
        folder = tmp_path_factory.mktemp(kind)
        on_ranks(count, train_forms, str(folder), section)
        shares(folder, count)
        for last in folder.glob("*/checkpoints/step-000004"):
            shutil.rmtree(last)
        return folder

    @cache
    def move(kinds: tuple[str, str]) -> dict[Any, Any]:
        folder = shutil.copytree(before(kinds[0]), tmp_path_factory.mktemp("moved") / "runs")
        count, section = spread(kinds[1])
        found = on_ranks(count, train_forms, str(folder), section)[0]
        shares(folder, count)
        return found

    return move


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.parametrize("move", MOVES, ids="-".join)
def test_a_checkpoint_goes_on_with_any_number_of_ranks(
    move: tuple[str, str], case: str, form: str, trained: Any, continued: Any
) -> None:
    """Fused AdamW pairs moments and weights as they lie in memory, and some weights are channels-last."""
    expected, found = trained("one")[0][case], continued(move)[case, form]
    require_same_records(expected["records"], found["records"])
    assert furthest(expected["tensors"], found["tensors"]) < TOLERANCE


@pytest.mark.parametrize("form", ["whole", "sharded"])
def test_adamw_alone_resumes_to_the_same_bits(form: str, tmp_path: Path) -> None:
    settings = {"steps": 4, "checkpoints": {"every": 2, "format": form}}
    straight = train(str(tmp_path), settings)
    shutil.rmtree(tmp_path / "checkpoints" / "step-000004")
    assert furthest(straight["tensors"], train(str(tmp_path), settings)["tensors"]) == 0


def full_on_one(run: str, changes: dict[str, Any]) -> tuple[str, str]:
    """A training whose rank 1 finds the disk full at its second checkpoint."""
    from tutti.storage import shards

    write = shards.write

    def refuse(folder: Path, *given: Any) -> Any:
        if current_ranks().rank == 1 and "step-000004" in str(folder):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, *given)

    shards.write = refuse
    try:
        train(run, changes)
    except UserError as error:
        return "UserError", str(error)
    return "went on", ""


@pytest.mark.parametrize("background", [False, True])
def test_a_disk_that_is_full_for_one_rank_stops_all_and_leaves_the_checkpoint_before(
    background: bool, tmp_path: Path
) -> None:
    changes = {"checkpoints": {"every": 2, "format": "sharded", "background": background}}
    found = on_ranks(2, full_on_one, str(tmp_path), {**changes, "parallel": {"kind": "fsdp"}})
    for kind, message in found:
        assert kind == "UserError" and "step-000004: cannot write, the disk" in message
    assert [item.name for item in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 2


def train_and_resume(
    folder: str, section: dict[str, Any], forms: tuple[str, ...], size: int
) -> dict[str, list[Any]]:
    """A training, and the same again from its checkpoint of step 2, with `size` windows in a batch."""
    from fixtures import ranks_training

    ranks_training.SIZE = size
    found: dict[str, list[Any]] = {}
    for form in forms:
        run = Path(folder) / form
        settings = {"steps": 4, "checkpoints": {"every": 2, "format": form}, **section}
        first = train(str(run), settings)
        ranks_training.forget(run, 4)
        found[form] = [first, train(str(run), settings)]
    return found


@pytest.mark.parametrize(
    ("kind", "forms", "size"), [("ddp2", FORMS[:1], 8), ("ddp3", FORMS[:1], 9), ("fsdp2", FORMS, 8)]
)
def test_a_resumed_training_ends_with_the_same_bytes(
    kind: str, forms: tuple[str, ...], size: int, tmp_path: Path
) -> None:
    count, section = spread(kind)
    for first, again in on_ranks(count, train_and_resume, str(tmp_path), section, forms, size)[0].values():
        assert again["records"] == first["records"]
        assert furthest(first["tensors"], again["tensors"]) == 0
        moments, others = tensors_of(first["optimizer"]), tensors_of(again["optimizer"])
        assert moments.keys() == others.keys()
        assert all(torch.equal(value, others[key]) for key, value in moments.items())


def fault(run: str, changes: dict[str, Any], poison: tuple[int, int], sections: Any = None) -> dict[str, Any]:
    with pytest.raises(NonFiniteError) as caught:
        train(run, changes, sections, poison)
    return {"message": str(caught.value), "windows": caught.value.windows, "step": caught.value.step}


@pytest.mark.parametrize("kind", ["ddp2", "fsdp2"])
def test_a_nan_on_one_rank_stops_all_and_names_it(kind: str, tmp_path: Path) -> None:
    count, section = spread(kind)
    found = on_ranks(count, fault, str(tmp_path), section, (2, SIZE - 1))
    batch = make_batch(2, SIZE)
    for one in found:
        assert one == found[0]
        assert one["message"].startswith("Step 3: the loss term 'action' is nan on rank 1.")
        assert one["windows"] == batch.window[SIZE // 2 :].tolist() and one["step"] == 3
    (saved,), weights = load_step(tmp_path / "failures" / "step-000003")
    assert saved.window.tolist() == batch.window.tolist()  # the batch of all, for a replay on one process
    assert saved.actions[-1].isnan().all() and saved.actions[:-1].isfinite().all()
    assert all(value.isfinite().all() for own in weights.values() for value in own.values())


def test_a_nan_may_be_skipped_on_all_ranks_together(tmp_path: Path) -> None:
    changes = {"steps": 4, "gradients": {"non_finite": "skip"}}
    runs = []
    for kind in ("one", "ddp2", "fsdp2"):
        count, section = spread(kind)
        runs.append(on_ranks(count, train, str(tmp_path / kind), changes | section, None, (2, 1))[0])
    for other in runs[1:]:
        require_same_records(runs[0]["records"], other["records"])
        assert furthest(runs[0]["tensors"], other["tensors"]) < TOLERANCE


def interrupted(run: str, changes: dict[str, Any]) -> tuple[str, int]:
    import os
    import signal

    trainer = trainer_of(Path(run), changes)

    def stop(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == 2 and not world().first:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.progress = stop
    try:
        trainer.fit(Data())
    except SystemExit as error:
        return type(error).__name__, trainer.step
    return "went on", trainer.step


def test_a_signal_to_one_rank_saves_and_ends_all(tmp_path: Path) -> None:
    assert on_ranks(2, interrupted, str(tmp_path), {}) == [("Terminated", 2)] * 2
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 2


def different() -> str:
    trainer_of(Path("unused"), {}).parallel.check()
    torch.manual_seed(current_ranks().rank)
    with pytest.raises(UserError) as caught:
        trainer = trainer_of(Path("unused"), {})
        trainer.model.fusion.readout.data += current_ranks().rank
        trainer.parallel.check()
    return str(caught.value)


def test_ranks_with_different_weights_are_refused() -> None:
    for message in on_ranks(2, different):
        assert "such as model.fusion.readout, differ between rank 0 and rank 1" in message


def said(work: Callable[[], Any]) -> str:
    """What the user is told of a training that is given up; of the rank that hung nothing is asked."""
    try:
        work()
    except UserError as error:
        return str(error)
    except RuntimeError:
        return "hung"
    return "went on"


def hangs(run: str, changes: dict[str, Any]) -> str:
    import time

    trainer = trainer_of(Path(run), changes)

    def sleep(step: int, steps: int, latest: dict[str, float]) -> None:
        if step == 2 and current_ranks().rank == 1:
            time.sleep(8)

    trainer.progress = sleep
    return said(lambda: trainer.fit(Data()))


def test_a_rank_that_hangs_is_named(tmp_path: Path) -> None:
    first, _ = on_ranks(2, hangs, str(tmp_path), {}, timeout=4.0)
    assert first.startswith("rank 0 waited in vain") and "hung or dead: rank 1." in first


def hangs_in_a_save(run: str, changes: dict[str, Any]) -> str:
    import time

    from tutti.training.checkpointing.saver import Saver

    collect = Saver.collect

    def slow(self: Saver, value: Any, *, copy: bool = False) -> Any:
        if current_ranks().rank == 1 and not asleep:
            asleep.append(True)
            time.sleep(8)
        return collect(self, value, copy=copy)

    asleep: list[bool] = []
    Saver.collect = slow
    return said(lambda: train(run, changes))


def test_a_rank_that_hangs_while_its_state_is_copied_is_named(tmp_path: Path) -> None:
    changes = {"checkpoints": {"format": "sharded"}, "parallel": {"kind": "fsdp"}}
    first, _ = on_ranks(2, hangs_in_a_save, str(tmp_path), changes, timeout=4.0)
    assert first.startswith("rank 0 waited in vain") and "hung or dead: rank 1." in first


def failing_on_one(run: str, changes: dict[str, Any], what: str) -> str:
    from tutti.storage import shards
    from tutti.training.checkpointing import saver as saving

    def fail(*given: Any, **named: Any) -> Any:
        if what == "retain":
            raise UserError("the folder is locked")
        if current_ranks().rank == 1:
            raise MemoryError("no room")
        return write(*given, **named)

    write = shards.write
    if what == "retain":
        saving.retain = fail
    else:
        shards.write = fail
    try:
        train(run, changes)
    except UserError as error:
        return str(error)
    except MemoryError:
        return "no room"
    return "went on"


@pytest.mark.parametrize(("what", "background"), [("retain", False), ("retain", True), ("write", True)])
def test_whatever_fails_on_one_rank_while_saving_ends_all(
    what: str, background: bool, tmp_path: Path
) -> None:
    changes = {"checkpoints": {"format": "sharded", "background": background}}
    for message in on_ranks(2, failing_on_one, str(tmp_path), changes, what):
        assert ("locked" if what == "retain" else "no room") in message


def test_a_batch_that_the_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    def cure(error: AssertionError) -> bool:
        return "data.batch_size is 8, the windows of a batch on all 3 ranks" in str(error)

    with pytest.raises(AssertionError) as caught:
        on_ranks(3, train, str(tmp_path), {})
    assert cure(caught.value) and "Set data.batch_size to 6 or 9" in str(caught.value)


@pytest.mark.parametrize("sections", [K_GRADIENTS, MASKED, SHARES, {"training": {"compile": True}}])
def test_what_fsdp_cannot_do_is_refused_with_the_reason(sections: dict[str, Any]) -> None:
    training = {"parallel": {"kind": "fsdp"}, "schedule": {"kind": "wsd", "warmup": 1}}
    given = {**sections, "training": {**sections.get("training", {}), **training}}
    with pytest.raises(ValueError, match=r"parallel\.kind fsdp with .*parallel\.kind=ddp"):
        RunConfig.model_validate(given)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_kind_for_several_processes_says_how_to_start_them(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torchrun --nproc-per-node N -m -- tutti train CONFIG"):
        trainer_of(tmp_path, {"parallel": {"kind": kind}})
