"""A policy without proprioception (data.sources.state none): from the data to the robot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import squares_data
from fixtures.served import serving
from tutti import pipeline
from tutti.config.run_config import RunConfig
from tutti.debug.doctor import run_doctor
from tutti.debug.probe import probe_checkpoint
from tutti.runs.build import build_parts, describe_model
from tutti.serving.client import Client
from tutti.serving.export import export_policy
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.serving.policy import Policy
from tutti.types import UserError

TEXT = squares_data.TEXTS[0]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = squares_data.write(tmp_path_factory.mktemp("data") / "set", squares_data.episodes(12))
    return squares_data.config(
        folder,
        data={"sources": [{"path": str(folder), "state": "none"}]},
        objective={"state": None},
        training={
            "steps": 6,
            "schedule": {"kind": "wsd", "warmup": 2},
            "checkpoints": {"every": 3},
            "diagnostics": {"every": 3},
        },
    )


@pytest.fixture(scope="module")
def run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "blind"
    pipeline.train(config, run)
    pipeline.evaluate(run)
    return run


def pictures() -> dict[str, np.ndarray]:
    return {name: np.full((32, 32, 3), 90, np.uint8) for name in ("front", "mirror")}


def test_it_is_trained_evaluated_probed_and_reported(run: Path) -> None:
    page = pipeline.report(run).read_text()
    assert "nan" not in page.lower().split("<style")[0]
    probe_checkpoint(run)
    probes = json.loads((run / "probes" / "probes.json").read_text())
    named = [row["name"] for row in (*probes["ablations"]["rows"], *probes["baselines"])]
    assert "no images" in named and not {"no state", "state alone"} & set(named)


def test_the_sequence_of_tokens_has_none_for_the_state(config: RunConfig) -> None:
    assert [row.name for row in describe_model(config).tokens][:2] == ["readout", "language"]


def test_it_predicts_and_is_exported_without_a_state(run: Path, tmp_path: Path) -> None:
    policy = Policy.load(run)
    assert policy.spec.state_dim == 0 and policy.spec.state_names == ()
    chunk = policy.predict(pictures(), None, TEXT)
    exported = Policy.load(export_policy(run, tmp_path / "export"))
    np.testing.assert_array_equal(exported.predict(pictures(), None, TEXT), chunk)
    assert exported.check(pictures(), None, TEXT) == []
    # A simulator has a state all the same.
    in_rollouts = CheckpointPolicyFactory(run)()
    np.testing.assert_array_equal(in_rollouts.predict(pictures(), np.ones(2, np.float32), TEXT), chunk)


def test_doctor_looks_at_it(config: RunConfig, tmp_path: Path) -> None:
    kinds = {finding.kind for finding in run_doctor(config, tmp_path / "run", updates=2).findings}
    assert not {"state_leak", "state_near_action", "constant_dimensions"} & kinds


def test_a_state_that_is_there_may_be_withheld_and_the_probes_say_so(tmp_path: Path) -> None:
    folder = squares_data.write(tmp_path / "set", squares_data.episodes(12))
    training = {"steps": 4, "schedule": {"kind": "wsd", "warmup": 2}}
    values = squares_data.config(folder, training=training).model_dump()
    values["model"]["fusion"] |= {"withhold_state": True, "state_dropout": 0.0}
    run = tmp_path / "run"
    pipeline.train(RunConfig.model_validate(values), run)  # its state is still a target of the term `state`
    policy, states = Policy.load(run), np.float32([[0.0, 0.0], [0.5, -0.5]])
    chunks = [policy.predict(pictures(), state, TEXT) for state in (*states, None)]
    for chunk in chunks[1:]:
        np.testing.assert_array_equal(chunk, chunks[0])
    exported = Policy.load(export_policy(run, tmp_path / "export"))
    assert not exported.needs_state and exported.check(pictures(), None, TEXT) == []
    assert exported.check(pictures(), 1e6 * np.ones(2), TEXT) == []  # far outside, and of no effect
    with pytest.raises(UserError, match="state: expected 2 numbers"):
        exported.predict(pictures(), np.ones(3), TEXT)
    np.testing.assert_array_equal(exported.predict(pictures(), states[1], TEXT), chunks[0])
    np.testing.assert_array_equal(exported.act({**pictures(), "prompt": TEXT}), chunks[0][0])
    with serving(exported) as (_, address), Client(address) as client:
        assert client.metadata["needs_state"] is False
        np.testing.assert_array_equal(client.infer({**pictures(), "prompt": TEXT})["actions"], chunks[0])
    card = (tmp_path / "export" / "README.md").read_text()
    assert "pictures and an instruction in" in card and "| state, not read |" in card
    probe_checkpoint(run)
    probes = json.loads((run / "probes" / "probes.json").read_text())
    assert "no state" not in {row["name"] for row in probes["ablations"]["rows"]}
    (said,) = [one for one in probes["findings"] if one["kind"] == "state_withheld"]
    assert said["severity"] == "ok" and "model.fusion.withhold_state" in said["sentence"]


@pytest.mark.parametrize(
    ("objective", "named"),
    [
        ({"state": {}}, r"objective\.state: nothing"),
        ({"near": {"kind": "state_contrastive"}, "state": {}}, r"objective\.state, objective\.near: nothing"),
    ],
)
def test_terms_that_read_the_state_are_refused_together(
    config: RunConfig, tmp_path: Path, objective: dict, named: str
) -> None:
    values = config.model_dump() | {"objective": objective}
    with pytest.raises(UserError, match=rf"{named}(.*\n)+.*objective\.state=null"):
        build_parts(RunConfig.model_validate(values), tmp_path)


def test_there_is_nothing_to_drop_of_it(config: RunConfig, tmp_path: Path) -> None:
    fusion = config.model.fusion.model_copy(update={"state_dropout": 0.5})
    model = config.model.model_copy(update={"fusion": fusion})
    with pytest.raises(UserError, match=r"state_dropout is 0\.5, but there is no state"):
        build_parts(config.model_copy(update={"model": model}), tmp_path)


def test_a_state_of_no_numbers_trains_the_rest_as_ever(config: RunConfig, tmp_path: Path) -> None:
    data, model, objective = build_parts(config, tmp_path)
    batch = data.validation[0]
    losses = objective(model(batch.observation), batch, model)
    losses.total.backward()
    assert torch.isfinite(losses.total) and batch.observation.state.shape[1] == 0
    missing = [name for name, value in model.named_parameters() if value.grad is None]
    assert missing == []
