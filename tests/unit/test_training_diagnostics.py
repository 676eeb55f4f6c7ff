"""Looking at a training changes none of its bits, and records what is true of it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixtures import learnable, toy_training
from fixtures.run_equality import differing, killed_and_resumed
from tutti.training.backward.k_gradients import KGradientsConfig
from tutti.training.backward.masked import KnowledgeInsulationConfig
from tutti.training.faults.saved_steps import load_step
from tutti.training.metric_names import describe_metric
from tutti.training.records import read_records
from tutti.training.strategy import PhasesConfig, TwoStageConfig
from tutti.training.update import Update, read_scalars, to_host
from tutti.types import Batch, LossTerms

OFF = {"every": 0, "spikes": {"z_threshold": "off"}}
PARTS = ("vision", "language", "fusion", "action")


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(value, other[name]) for name, value in one.items())


def looks(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(run) if record["kind"] == "diagnostics"]


def train(run: Path, **keywords: Any) -> Any:
    trainer = learnable.make_trainer(run, **keywords)
    trainer.fit(learnable.Data())
    return trainer


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(folder, steps=12)
    return folder


@pytest.mark.parametrize("accumulation", [1, 2])
def test_looking_changes_no_bit_of_the_training(tmp_path: Path, accumulation: int) -> None:
    """With dropout, Muon, the moving average, validation and a buffer that every forward pass moves."""

    class Counting(toy_training.TwoTerms):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, *arguments: Any, **keywords: Any) -> LossTerms:
            assert isinstance(self.seen, Tensor)
            self.seen = self.seen + float(self.training) * torch.rand(())
            return super().forward(*arguments, **keywords)

    ends = []
    for name, diagnostics in (("with", {"every": 1, "share": 0.5}), ("without", OFF)):
        torch.manual_seed(0)
        model = toy_training.Model()
        settings = toy_training.config(
            optimizer={"kind": "muon"}, accumulation=accumulation, diagnostics=diagnostics
        )
        trainer = toy_training.Trainer(settings, model, Counting(), tmp_path / name)
        trainer.fit(toy_training.Data())
        latest = {k: v for k, v in trainer.counters.latest.items() if not k.startswith("time/")}
        ends.append((weights(trainer.model), weights(trainer.objective), latest))
        assert trainer.model.training and trainer.objective.training
    assert same(ends[0][0], ends[1][0]) and same(ends[0][1], ends[1][1])
    assert ends[0][2] == ends[1][2]
    assert len(looks(tmp_path / "with")) == 20 and looks(tmp_path / "without") == []


def test_a_look_leaves_the_gradients_and_random_states_alone(tmp_path: Path) -> None:
    trainer = toy_training.make_trainer(tmp_path, diagnostics={"every": 1})
    batch = toy_training.make_batch(0)
    terms = trainer.objective(trainer.model(batch.observation), batch, trainer.model)
    terms.total.backward()
    before = {name: p.grad.clone() for name, p in trainer.parameters.items() if p.grad is not None}
    random = torch.get_rng_state()
    update = Update(
        step=0, point=trainer.strategy.at(0), active_terms=trainer.objective.names, batches=[batch]
    )
    update.terms, _ = to_host([read_scalars(terms)])
    trainer.diagnostics.before_step(update)
    assert torch.equal(random, torch.get_rng_state())
    after = {name: p.grad for name, p in trainer.parameters.items() if p.grad is not None}
    assert set(before) == set(after) and all(torch.equal(before[name], after[name]) for name in before)


def test_every_look_is_recorded_and_described(run: Path) -> None:
    found = looks(run)
    assert [record["step"] for record in found] == [3, 6, 9, 12]
    names = set(found[-1]) - {"step", "kind"}
    assert all(name.startswith("diag/") and describe_metric(name) for name in names)
    terms = ("align", "action", "recon", "state")
    assert {f"diag/{what}/{t}/{p}" for what in ("norm", "share") for t in terms for p in PARTS} <= names
    assert {f"diag/update_ratio/{part}" for part in PARTS} <= names
    assert {f"diag/dead/{what}" for what in ("vision", "language", "fused", "readout")} <= names
    assert {"diag/rank/fused", "diag/rank/readout", "diag/noise_trace", "diag/signal", "diag/spikes"} <= names
    cosines = {name for name in names if name.startswith("diag/cosine/")}
    assert len(cosines) == 6 + 6 + 3  # align does not reach the fusion, and the decoder is the action's alone
    assert "diag/cosine/align~action/vision" in cosines
    assert list((run / "tensorboard").iterdir())


def test_shares_of_a_part_sum_to_one_and_follow_the_reach_of_the_terms(run: Path) -> None:
    for record in looks(run):
        for part in PARTS:
            shares = [v for n, v in record.items() if n.startswith("diag/share/") and n.endswith(f"/{part}")]
            assert sum(shares) == pytest.approx(1.0)
        assert record["diag/norm/align/fusion"] == record["diag/norm/recon/action"] == 0.0
        assert record["diag/share/action/action"] == 1.0
        assert 1 <= record["diag/rank/readout"] <= record["diag/rank_limit/readout"] == 8
        assert record["diag/rank_limit/fused"] == 32  # the width; there are more rows
        assert all(-1 <= v <= 1.0001 for n, v in record.items() if n.startswith("diag/cosine/"))


def test_norm_of_the_whole_batch_is_that_of_the_real_gradient(tmp_path: Path) -> None:
    """At share 1 and without dropout the look sees the step's own batch: sum lambda g is its gradient."""
    torch.manual_seed(0)
    model = toy_training.Model(dropout=0.0)
    objective = toy_training.TwoTerms(recon_weight=0.0)
    settings = toy_training.config(
        steps=6, gradients={"clip_norm": "off"}, diagnostics={"every": 1, "share": 1.0}, log_every=1
    )
    toy_training.Trainer(settings, model, objective, tmp_path).fit(toy_training.Data())
    train_records = [r for r in read_records(tmp_path) if r["kind"] == "train"]
    parts = ("stem", "token", "state", "norm", "action")
    for record, real in zip(looks(tmp_path), train_records, strict=True):
        norms = [record[f"diag/norm/action/{part}"] for part in parts]
        # model.position belongs to no part, so the parts have a little less than all of it
        assert (
            0.9 * real["optim/grad_norm"]
            < sum(n**2 for n in norms) ** 0.5
            <= 1.0001 * real["optim/grad_norm"]
        )
        assert "diag/noise_scale" not in record and "diag/signal" not in record


def test_update_ratio_is_that_of_the_optimizers_step(tmp_path: Path) -> None:
    trainer = toy_training.make_trainer(tmp_path, steps=4, diagnostics={"every": 4}, checkpoints={"every": 0})
    before: dict[str, Tensor] = {}

    def keep(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step == 3:
            before.update(weights(trainer.model))

    trainer.progress = keep
    trainer.fit(toy_training.Data())
    after = trainer.model.state_dict()
    names = [name for name in before if name.startswith("action.")]
    moved, size = (
        torch.cat([x.flatten() for x in xs]).norm()
        for xs in ([after[n] - before[n] for n in names], [before[n] for n in names])
    )
    assert looks(tmp_path)[-1]["diag/update_ratio/action"] == pytest.approx(float(moved / size), rel=1e-4)


def test_a_frozen_part_and_an_absent_action_are_left_out(tmp_path: Path) -> None:
    train(tmp_path / "stages", steps=12, strategy=TwoStageConfig())
    first, last = looks(tmp_path / "stages")[0], looks(tmp_path / "stages")[-1]
    assert "diag/norm/align/vision" in first and not any(
        "/action" in name for name in first if "norm" in name and "/action/" in name
    )
    assert "diag/norm/action/vision" in last and "diag/norm/align/vision" not in last
    phases = [{"name": "still", "share": 1, "learning_rates": {"vision": 0}}]
    train(tmp_path / "frozen", steps=4, strategy=PhasesConfig.model_validate({"list": phases}))
    frozen = looks(tmp_path / "frozen")[0]
    kinds = ("diag/norm/", "diag/share/", "diag/cosine/", "diag/update_ratio/")
    assert not [name for name in frozen if name.endswith("/vision") and name.startswith(kinds)]
    assert "diag/dead/vision" in frozen and "diag/norm/action/fusion" in frozen


def test_resumed_run_records_and_ends_like_an_undisturbed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of step 10 the checkpoint has the noise scale's averages, the spike detector's levels and the momenta
    of the window of updates that ends with step 12."""
    monkeypatch.setattr("tutti.training.diagnostics.update_shares.EVERY", 10)
    settings = {"diagnostics": {"every": 1, "spikes": {"warmup": 3}}, "optimizer": {"kind": "muon"}}
    straight = toy_training.make_trainer(tmp_path / "b", **settings)
    straight.fit(toy_training.Data())
    killed_and_resumed(tmp_path / "a", (12,), **settings)
    assert differing(tmp_path / "a", tmp_path / "b") == []
    assert straight.diagnostics.noise.trace != 0.0
    ends = [record["step"] for record in looks(tmp_path / "a") if "diag/update_share/recon/stem" in record]
    assert ends == [2, 12]


def test_cadence_and_share_may_change_when_a_run_is_resumed(tmp_path: Path) -> None:
    toy_training.make_trainer(tmp_path, steps=10, diagnostics=OFF).fit(toy_training.Data())
    toy_training.make_trainer(tmp_path, steps=14, diagnostics={"every": 2}).fit(toy_training.Data())
    assert [record["step"] for record in looks(tmp_path)] == [12, 14]


def test_noise_scale_needs_a_sum_as_gradient_and_a_mask_is_respected(tmp_path: Path) -> None:
    for name, backward in (("masked", KnowledgeInsulationConfig()), ("weighed", KGradientsConfig())):
        train(tmp_path / name, steps=6, backward=backward)
    masked, weighed = looks(tmp_path / "masked"), looks(tmp_path / "weighed")
    assert all("diag/signal" in record for record in masked)
    assert not any("diag/signal" in record for record in weighed)
    for record in masked:
        assert record["diag/norm/action/vision"] == record["diag/norm/action/language"] == 0.0
        assert record["diag/norm/action/fusion"] > 0.0 and record["diag/norm/recon/vision"] > 0.0
    assert all(record["diag/norm/action/vision"] > 0.0 for record in weighed)


def test_language_units_are_not_judged_where_all_have_one_instruction(tmp_path: Path) -> None:
    def alike(number: int, batch: Batch) -> Batch:
        batch.instruction_id.fill_(1)
        return batch

    toy_training.make_trainer(tmp_path, steps=4, diagnostics={"every": 2}).fit(toy_training.Data(alike))
    assert not any("diag/dead/language" in record for record in looks(tmp_path))
    assert all("diag/dead/vision" in record for record in looks(tmp_path))


def test_a_loss_spike_is_counted_recorded_said_and_saved(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def jump(number: int, batch: Batch) -> Batch:
        if number in (11, 14, 17):
            batch.actions.mul_(1000)
        return batch

    diagnostics = {"every": 0, "spikes": {"warmup": 8, "keep": 2}}
    trainer = toy_training.make_trainer(tmp_path, diagnostics=diagnostics, checkpoints={"every": 0})
    with caplog.at_level(logging.WARNING, "tutti.training"):
        trainer.fit(toy_training.Data(jump))
    told = [r.getMessage() for r in caplog.records if "loss spike" in r.getMessage()]
    assert (
        len(told) == 3
        and told[0].startswith("step 12: loss spike: action ")
        and "spikes/step-000012" in told[0]
    )
    recorded = looks(tmp_path)
    assert [(r["step"], r["diag/spikes"]) for r in recorded] == [(12, 1), (15, 2), (18, 3)]
    assert all(r["diag/spike/action"] > 6 and "diag/spike/recon" not in r for r in recorded)
    assert sorted(path.name for path in (tmp_path / "spikes").iterdir()) == ["step-000015", "step-000018"]
    folder = tmp_path / "spikes" / "step-000015"
    about = json.loads((folder / "spike.json").read_text())
    assert about["step"] == 15 and about["windows"] == [14000, 14001, 14002, 14003]
    # A replay of the saved batch on the saved weights gives the value that was a spike (up to dropout).
    batches, kept = load_step(folder)
    model = toy_training.Model(dropout=0.0)
    model.load_state_dict(kept["model"])
    replayed = toy_training.TwoTerms()(model(batches[0].observation), batches[0], model).values["action"]
    assert float(replayed.detach()) == pytest.approx(about["terms"]["action"]["value"], rel=0.01)
