"""Every golden curve comes out again: to the last bit on its machine type, within a tolerance elsewhere."""

from __future__ import annotations

import copy
import json
import math

import pytest
from golden import FOLDER, PRESETS, STEPS, curve, deviations, machine_type, stored, tolerance


@pytest.mark.parametrize("name", PRESETS)
def test_a_golden_curve_comes_out_again(name: str) -> None:
    kept = stored(name)
    here = machine_type()
    wrong = list(deviations(kept["steps"], curve(name), exact=kept["machine"] == here))
    assert not wrong, (
        f"{len(wrong)} values, first: {wrong[0]}. Written: {kept['reason']} (on {kept['machine']}, here "
        f"{here}). If the computation was meant to change: PYTHONPATH=tests python tests/numerics/golden.py "
        "--write WHY"
    )


def test_every_file_belongs_to_a_preset_and_says_why_it_was_written() -> None:
    assert {path.stem for path in FOLDER.glob("*.json")} == set(PRESETS)
    assert all(stored(name)["reason"].strip() and len(stored(name)["steps"]) == STEPS for name in PRESETS)


def test_the_curves_differ_from_one_another() -> None:
    steps = {json.dumps(stored(name)["steps"]) for name in PRESETS}
    assert len(steps) == len(PRESETS)


def test_the_curve_of_the_average_tells_it_from_the_weights_in_training() -> None:
    """`ema` makes the updates of `plain`, so what it adds is what the average alone can give."""
    plain, average = stored("plain")["steps"], stored("ema")["steps"]
    shared = [{key: step[key] for key in own} for own, step in zip(plain, average, strict=True)]
    assert list(deviations(plain, shared, exact=False)) == []
    added = {key for key in average[-1] if key not in plain[-1]}
    assert any(key.startswith("average/ema/") for key in added)
    assert {"valid/action", "valid/total"} <= added


def test_the_comparison_can_fail() -> None:
    kept = stored("plain")["steps"]
    found = copy.deepcopy(kept)
    assert list(deviations(kept, found, exact=True)) == []
    found[4]["loss/total"] = math.nextafter(found[4]["loss/total"], math.inf)
    (sentence,) = deviations(kept, found, exact=True)
    assert sentence.startswith("step 5: loss/total was ")
    assert list(deviations(kept, found, exact=False)) == []
    largest = max(step["loss/total"] for step in kept)
    found[4]["loss/total"] = kept[4]["loss/total"] + 1.01 * tolerance(5) * largest
    assert len(list(deviations(kept, found, exact=False))) == 1
    found[4]["loss/total"] = math.nan
    del found[5]["loss/action/raw"]
    assert len(list(deviations(kept, found[:9], exact=False))) == 3


def test_the_tolerance_grows_and_stays_below_what_a_mistake_makes() -> None:
    assert tolerance(1) == pytest.approx(3.2e-5) and tolerance(STEPS) < 2.5e-3
