"""What is compared where a training goes on: its data, the machine, keys that change the last bits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fixtures.toy_training import Data, make_trainer
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.training.checkpointing.data_files import data_differences
from tutti.types import UserError

STATES = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
ACTIONS = np.random.default_rng(1).normal(size=(100, 2)).astype(np.float32)
SPEC = {"views": ["front"], "image_size": 32, "state_dim": 3, "action_names": ["x", "gripper"]}


def files(
    *,
    spec: dict[str, Any] = SPEC,
    states: np.ndarray = STATES,
    actions: np.ndarray = ACTIONS,
    kind: Any = "quantile",
    robot: str = "arm",
    texts: tuple[str, ...] = ("open it", "close it"),
    length: int | None = None,
) -> dict[str, str]:
    return {
        "spec.json": json.dumps(spec),
        "normalizer.json": json.dumps(Normalizer.fit(kind, robot, states, actions).to_dict()),
        "tokenizer.json": Tokenizer.fit(set(texts), 270, length).to_json(),
    }


OTHER = ACTIONS.copy()
OTHER[7, 1] = 99.0

CHANGES = [
    ({"spec": SPEC | {"image_size": 64}}, "spec.image_size: 32 -> 64"),
    ({"spec": SPEC | {"views": ["top"]}}, 'spec.views: ["front"] -> ["top"]'),
    (
        {"spec": SPEC | {"action_names": ["gripper", "x"]}},
        'spec.action_names: ["x", "gripper"] -> ["gripper", "x"]',
    ),
    ({"actions": OTHER}, "normalizer: action, max of dimension 1 (gripper): 2."),
    ({"states": STATES[:, :2]}, "normalizer: size of the state: 3 -> 2"),
    ({"states": STATES + np.float32(0.01)}, "normalizer: state, q01 of dimension 0: "),
    ({"kind": "standard"}, 'normalizer: kind: "quantile" -> "standard"'),
    ({"robot": "hand"}, 'normalizer: embodiments: ["arm"] -> ["hand"]'),
    ({"texts": ("open it", "shut it now")}, "tokenizer: tokens of the texts: "),
    ({"length": 9}, "tokenizer.text_length: "),
    ({"length": 9}, "tokenizer.max_length: "),
]


@pytest.mark.parametrize(
    ("change", "line"), CHANGES, ids=lambda value: next(iter(value)) if isinstance(value, dict) else ""
)
def test_each_change_of_sizes_statistics_or_texts_is_named(change: dict[str, Any], line: str) -> None:
    lines = data_differences(files(), files(**change))
    assert any(one.startswith(line) for one in lines), lines
    assert data_differences(files(**change), files(**change)) == []


def test_sums_of_another_order_and_keys_of_today_are_no_difference() -> None:
    now = json.loads(files()["normalizer.json"])
    mean = now["stats"]["arm"]["state"]["mean"]
    mean[0] += 1e-9
    moved = files() | {"normalizer.json": json.dumps(now)}
    assert data_differences(files(), moved) == []
    assert data_differences(files(), files(spec=SPEC | {"state_names": ["a", "b", "c"]})) == []


def test_a_resume_on_other_data_is_refused_with_the_cure(tmp_path: Path) -> None:
    make_trainer(tmp_path, steps=4, files=files()).fit(Data())
    with pytest.raises(UserError) as caught:
        make_trainer(tmp_path, steps=6, files=files(actions=OTHER)).fit(Data())
    said = str(caught.value)
    assert "max of dimension 1 (gripper): 2." in said and "-> 99.0" in said and "train anew (--redo" in said
    assert make_trainer(tmp_path, steps=6, files=files()).fit(Data()).name == "step-000006"


def test_another_machine_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_trainer(tmp_path, steps=4).fit(Data())
    make_trainer(tmp_path, steps=5).fit(Data())
    assert "last bits" not in caplog.text
    trainer = make_trainer(tmp_path, steps=6, deterministic=False)
    machine = replace(trainer.machine, processor="Another CPU (AVX2)")
    trainer.settings = replace(trainer.settings, machine=machine)
    trainer.fit(Data())
    (line,) = [message for message in caplog.messages if "last bits" in message]
    assert line.startswith("the last bits may differ from a training without a break: processor: ")
    assert 'Another CPU (AVX2)"; training.deterministic: true -> false' in line
