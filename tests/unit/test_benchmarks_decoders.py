"""The decoders' benchmark: what it measures is what the model's description says."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tutti.config.run_config import load_config
from tutti.models.decoders.fast import FastDecoder
from tutti.models.describe import blank_observation

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

decoders: Any = importlib.import_module("decoders")


def test_every_decoder_is_timed_and_published(tmp_path: Path) -> None:
    assert decoders.main(["--calls", "2", "--output", str(tmp_path / "decoders")]) == 0
    result = json.loads((tmp_path / "decoders.json").read_text())
    costs = result["costs"]
    assert [name for name in costs if "," not in name] == list(decoders.KINDS)
    # 128 -> 256 -> 8 * 4, by hand: two FLOPs for each multiply-add.
    assert costs["regression"]["parameters"] == 128 * 256 + 256 + 256 * 32 + 32
    assert costs["regression"]["flops"] == 2 * (128 * 256 + 256 * 32)
    assert costs["flow"]["flops"] == costs["diffusion"]["flops"] > costs["bins"]["flops"]
    assert all(cost["milliseconds"]["median"] > 0 for cost in costs.values())
    assert "| regression | 41,248 |" in (tmp_path / "decoders.md").read_text()


def test_fast_is_measured_at_its_slowest() -> None:
    config = load_config(decoders.DEMO, ["model.action.kind=fast"])
    model = decoders.build_model(config, decoders.data_spec(config))
    fast = model.action
    assert isinstance(fast, FastDecoder)
    seen = blank_observation(model.spec, next(model.parameters()).device)
    written = fast.write(fast.conditioning(model(seen)))
    assert written.shape[1] == int(fast.tokens.longest) < model.spec.horizon * model.spec.action_dim


def test_a_mistake_is_one_line(capsys: Any) -> None:
    assert decoders.main(["--config", "nothing.yaml"]) == 2
    assert "nothing.yaml: no such config file" in capsys.readouterr().out
