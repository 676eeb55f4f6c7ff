"""An export goes to a hub and comes back the same, and what comes back otherwise is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from test_serving_policy import look, model, relist, write
from typer.testing import CliRunner

from fixtures.hub import TOKEN, Hub, hub
from tutti.cli.app import app
from tutti.serving.export import export_policy
from tutti.serving.exports.hub import pull_export, push_export
from tutti.serving.policy import Policy
from tutti.types import UserError


@pytest.fixture
def standing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    constants = pytest.importorskip("huggingface_hub.constants")
    with hub() as held:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", held.address)
        template = held.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield held


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return export_policy(write(tmp_path / "step-000001", model()), tmp_path / "policy")


def test_what_is_pushed_is_pulled_and_acts_alike(standing: Hub, export: Path, tmp_path: Path) -> None:
    (export / "notes.pkl").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    result = CliRunner().invoke(app, ["push", str(export), "me/arm"])
    assert result.exit_code == 0, result.output
    about = json.loads((export / "export.json").read_text())
    assert set(standing.files) == {*about["files"], "export.json", "README.md"}, "what is not listed stays"
    assert standing.private is True and len(standing.large) == 1
    standing.files["model.bin"] = b"cos\nsystem\n(S'touch /tmp/x'\ntR."
    to = tmp_path / "pulled"
    result = CliRunner().invoke(app, ["pull", "me/arm", "--to", str(to)])
    assert result.exit_code == 0, result.output
    assert {one.name for one in to.iterdir()} == set(standing.files) - {"model.bin"}
    for one in to.iterdir():
        assert one.read_bytes() == (export / one.name).read_bytes() and not one.is_symlink()
    given = (*look(1), "open the tap")
    np.testing.assert_array_equal(Policy.load(to).predict(*given), Policy.load(export).predict(*given))
    with pytest.raises(UserError, match="exists"):
        pull_export("me/arm", to)


def test_where_records_and_checkpoints_were_sent_goes_with_no_export(tmp_path: Path) -> None:
    """An address of a tracker or of a mirror may hold a password."""
    step = write(tmp_path / "step-000001", model())
    config = yaml.safe_load((step / "config.yaml").read_text())
    config["logging"] = [
        *({"kind": "tensorboard"}, {"kind": "mlflow", "uri": "http://me:s3cret@host"}),
        {"kind": "my.logger:Own", "options": {"key": "s3cret"}},
    ]
    config["training"] = {"checkpoints": {"mirror": "s3://me:s3cret@bucket"}}
    (step / "config.yaml").write_text(yaml.safe_dump(config))
    export = export_policy(relist(step), tmp_path / "policy")
    assert not any(b"s3cret" in one.read_bytes() for one in export.rglob("*") if one.is_file())
    kept = yaml.safe_load((export / "config.yaml").read_text())
    assert kept["logging"] == [{"kind": "tensorboard"}] and kept["model"] == config["model"]
    given = (*look(1), "open the tap")
    np.testing.assert_array_equal(Policy.load(export).predict(*given), Policy.load(step).predict(*given))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda files: files.pop("export.json"), "expected export.json of an export of Tutti"),
        (lambda files: files.pop("spec.json"), r"spec.json: expected .* bytes .* found no such file"),
        (lambda files: files.update({"model.safetensors": b"x"}), "model.safetensors: expected .* found 1"),
        (
            lambda files: files.update({"spec.json": bytes(len(files["spec.json"]))}),
            "spec.json: damaged, its checksum differs",
        ),
        (
            lambda files: files.update({"export.json": b'{"files": {"../x": {"bytes": 1, "sha256": "0"}}}'}),
            "no plain name",
        ),
    ],
)
def test_a_repository_that_was_changed_leaves_nothing(
    standing: Hub, export: Path, tmp_path: Path, harm: object, says: str
) -> None:
    push_export(export, "me/arm", public=True)
    assert standing.private is False
    assert callable(harm)
    harm(standing.files)
    before = {one.name for one in tmp_path.iterdir()}
    with pytest.raises(UserError, match=says):
        pull_export("me/arm", tmp_path / "pulled")
    assert {one.name for one in tmp_path.iterdir()} == before


def test_what_is_missing_is_said(
    standing: Hub, export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="expected a folder of `tutti export`"):
        push_export(tmp_path / "step-000001", "me/arm")
    with pytest.raises(UserError, match="OWNER/NAME"):
        push_export(export, "../arm")
    with pytest.raises(UserError, match=r"me/other.*\n  cure: look at the name"):
        pull_export("me/other", tmp_path / "pulled")
    with pytest.raises(UserError, match=r"me/arm: .*\n  cure: look at the name and the network"):
        pull_export("me/arm", tmp_path / "pulled", endpoint="http://127.0.0.1:9")
    weights = export / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"x")
    with pytest.raises(UserError, match="its checksum differs"):
        push_export(export, "me/arm")
    weights.write_bytes(content)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError, match=r"hf auth login, or set HF_TOKEN of one who may"):
        push_export(export, "me/arm")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"hf auth login, or set HF_TOKEN"):
        push_export(export, "me/arm")
    assert standing.files == {} and not (tmp_path / "pulled").exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub.*tutti-vla\[hub\]"):
        push_export(export, "me/arm")
