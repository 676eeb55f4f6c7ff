"""Times in seconds become steps: the nearest, at least one, the same for a text and its number."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tutti.config.run_config import RunConfig, build_config, load_config, to_yaml
from tutti.durations import Seconds, in_steps, require_steps, resolved, times_in
from tutti.types import UserError

rates = st.one_of(st.integers(1, 1000).map(float), st.sampled_from([0.5, 12.5, 23.976, 29.97, 59.94]))
microseconds = st.integers(1, 10**10)


def text_of(count: int) -> Seconds:
    """So many microseconds, as a config may say it."""
    return Seconds(f"{count // 10**6}.{count % 10**6:06d}s")


@given(st.integers(1, 4096), rates)
def test_steps_written_as_seconds_come_back(steps: int, fps: float) -> None:
    assert in_steps(Seconds(f"{steps / fps:.6f}s"), fps) == steps == in_steps(steps, fps)


@given(microseconds, microseconds, rates)
def test_a_later_time_is_never_fewer_steps_and_the_nearest_is_taken(a: int, b: int, fps: float) -> None:
    first, second = (in_steps(text_of(count), fps) for count in sorted((a, b)))
    assert 1 <= first <= second
    exact = text_of(max(a, b)).value * Fraction(fps)
    assert abs(second - exact) <= Fraction(1, 2) or (second == 1 and exact < 1)


@given(st.integers(1, 999_999), rates)
def test_milliseconds_are_thousandths(count: int, fps: float) -> None:
    assert in_steps(Seconds(f"{count}ms"), fps) == in_steps(text_of(1000 * count), fps)


TIMED: dict[str, Any] = {
    "data": {"horizon": "0.8s"},
    "evaluation": {"actions_per_query": "400 ms"},
    "objective": {
        "recon": {"kind": "changed_patches", "offsets": ["0.1s", "0.4s"]},
        "state": {"offsets": ["0.2s", "0.4s"]},
        "latent": {"kind": "future_latent", "offsets": ["0.4s"]},
        "inverse": {"kind": "inverse_dynamics", "offset": "0.3s"},
    },
}


def timed() -> RunConfig:
    return build_config(TIMED, "config.yaml")


@pytest.mark.parametrize(("fps", "scale"), [(10.0, 1), (30.0, 3)])
def test_every_time_of_a_config_becomes_steps_and_is_said(fps: float, scale: int) -> None:
    config, lines = resolved(timed(), fps)
    terms: dict[str, Any] = config.objective.terms()
    found = config.data.horizon, config.evaluation.actions_per_query, terms["inverse"].offset
    assert found == (8 * scale, 4 * scale, 3 * scale)
    assert terms["recon"].offsets == (scale, 4 * scale) and terms["latent"].offsets == (4 * scale,)
    assert terms["state"].offsets == (2 * scale, 4 * scale)
    needs = config.objective.needs()
    assert needs.futures == tuple(scale * k for k in (1, 3, 4))
    assert needs.states == (2 * scale, 4 * scale, "last")
    assert f"data.horizon 0.8s = {8 * scale} steps at {fps:g} fps" in lines
    assert f"objective.recon.offsets 0.4s = {4 * scale} steps at {fps:g} fps" in lines and len(lines) == 8
    assert not any(times_in(config)) and resolved(config, 50.0) == (config, [])
    assert yaml.safe_load(to_yaml(config))["objective"]["recon"]["offsets"] == [scale, 4 * scale]


def test_a_config_keeps_its_times_in_yaml_and_by_overrides(tmp_path: Any) -> None:
    (tmp_path / "run.yaml").write_text(to_yaml(timed()))
    assert load_config(tmp_path / "run.yaml") == timed()
    given = ["objective.recon.offsets=[0.1s,400ms]", "data.horizon=0.5s"]
    changed = load_config(tmp_path / "run.yaml", given)
    assert [text for key, text in times_in(changed) if "recon" in key] == ["0.1s", "400ms"]
    assert resolved(changed, 10.0)[0].data.horizon == 5


def test_a_rounded_time_says_how_long_it_really_is() -> None:
    _, lines = resolved(build_config({"data": {"horizon": "0.75s"}}, "config.yaml"), 10.0)
    assert lines == ["data.horizon 0.75s = 8 steps (0.8s) at 10 fps"]


def test_times_that_are_no_steps_are_refused() -> None:
    same = {"objective": {"recon": {"offsets": ["0.4s", "0.42s"]}}}
    with pytest.raises(UserError, match=r"0\.42s = 4 steps.*\n  objective\.recon.*must rise and not repeat"):
        resolved(build_config(same, "config.yaml"), 10.0)
    with pytest.raises(UserError, match=r"data\.horizon 500s = 15000 steps.*\n  data\.horizon: .*4096"):
        resolved(build_config({"data": {"horizon": "500s"}}, "config.yaml"), 30.0)


@pytest.mark.parametrize("text", ["0.4", "0s", "-1s", "4 steps", "1e3s", "0.4 min", "s", ""])
def test_a_text_that_is_no_time_is_named_with_a_good_one(text: str) -> None:
    with pytest.raises(UserError, match=r"data\.horizon: expected steps, or a time .*'0\.4s'.*found"):
        build_config({"data": {"horizon": text}}, "config.yaml")


def test_where_the_rate_is_not_known_the_time_and_the_cure_are_named() -> None:
    config = timed()
    with pytest.raises(UserError, match=r"objective\.recon\.offsets is 0\.1s, but the frames a second"):
        config.objective.needs()
    with pytest.raises(UserError, match=r"data\.horizon is 0\.8s.*\n  cure"):
        require_steps(config.data, "data")
