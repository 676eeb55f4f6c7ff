"""Several robots and a remote data set as the commands show them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from test_data_robots import FRONT, SIDE, write
from typer.testing import CliRunner

from fixtures import squares_data
from tutti.cli.app import app

ARM = "memory://sets/arm"
CONFIG = """\
name: two
data:
  horizon: 3
  batch_size: 4
  image_size: 16
  validation_fraction: 0.4
  sources:
  - {path: "memory://sets/arm", views: {top: %s, side: %s}}
  - {path: %s, views: {top: %s}}
objective: {align: null, recon: null, state: {offsets: [2]}}
training: {steps: 2, schedule: {kind: wsd, warmup: 1}, device: cpu, threads: 1}
evaluation: {suite: none}
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A config of an arm, whose set lies in a remote store, and of a hand."""
    home = tmp_path_factory.mktemp("shown")
    system: Any = fsspec.filesystem("memory")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUTTI_CACHE", str(home / "cache"))
        patch.chdir(home)
        system.put(str(write(home / "arm", "arm", (FRONT, SIDE), (2, 3))), "/sets/arm", recursive=True)
        hand = write(home / "hand", "hand", (FRONT,), (4, 2))
        path = home / "two.yaml"
        model = json.dumps(squares_data.MODEL)
        path.write_text(CONFIG % (FRONT, SIDE, hand, FRONT) + f"model: {model}\n", encoding="utf-8")
        yield path
    system.store.clear()


def said(*arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    """What a command prints, without colours, lines and breaks."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code in codes, result.output
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|─+", "", result.output).split())


PLACES = "arm top, side 2 0-1 3 0-2 hand top 4 0-3 2 0-1"
NUMBERS = r"Robot hand: views top .*state 3 state\[3\] 3 [-\d.]+ [-\d.]+ action 0 action\[0\] 0 .* action 1"


def test_a_plan_and_the_doctor_show_the_robots(two: Path) -> None:
    assert PLACES in said("plan", two)
    assert PLACES in said("doctor", two, "--updates", 1, codes=(0, 1))  # of random numbers it may find more


def test_every_number_of_each_robot_is_shown_with_its_place_and_spread(two: Path) -> None:
    for command in ("inspect", "check"):
        assert re.search(NUMBERS, said("data", command, two, codes=(0, 1))), command
    found = json.loads(CliRunner().invoke(app, ["data", "check", str(two), "--json"]).output)["paths"][0]
    arm, hand = found["robots"]["arm"], found["robots"]["hand"]
    assert found["sources"][0]["name"] == ARM and arm["views"] == ["top", "side"]
    assert hand["state_slots"] == [0, 1, 2, 3] and len(hand["statistics"]["state"]["q99"]) == 4


def test_a_remote_set_is_inspected_by_its_url(two: Path, tmp_path: Path) -> None:
    found = said("data", "inspect", ARM, "--sheet", tmp_path / "sheet.png")
    assert f"{ARM}: lerobot, by meta/info.json; robot arm" in found and f"path: '{ARM}'" in found
    assert (tmp_path / "sheet.png").stat().st_size > 100
    assert "memory://sets/hand: there is no file there." in said(
        "data", "inspect", "memory://sets/hand", codes=(2,)
    )
    assert "two.yaml is a config" in said("data", "inspect", two, "--sheet", "a.png", codes=(2,))
