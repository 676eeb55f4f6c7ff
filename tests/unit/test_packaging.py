"""The packages: what they hold, the README on an index, and the commands of a wheel without a checkout."""

from __future__ import annotations

import email
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tutti.config.files import shipped_names

pytest.importorskip("hatchling", reason="needs hatchling, of the extra dev")
pytest.importorskip("hatch_fancy_pypi_readme", reason="needs hatch-fancy-pypi-readme, of the extra dev")
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CODE = re.compile(r"^```\w*\n.*?^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel, built and unpacked."""
    folder = tmp_path_factory.mktemp("packages")
    (sdist,) = SdistBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "sdist", filter="data")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "wheel")
    (source,) = (folder / "sdist").iterdir()
    return source, folder / "wheel"


def files_of(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def kept_by_git(*more: str) -> set[str]:
    """The files of the repository; with `--others` those that are new as well, but none that it ignores."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    command = ["git", "ls-files", "-z", "--cached", "--exclude-standard", *more]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).exists()}


def test_the_source_distribution_is_what_git_keeps(unpacked: tuple[Path, Path]) -> None:
    """So nothing that a test reads is missing, and nothing that lies about is shipped."""
    assert kept_by_git() <= files_of(unpacked[0]) <= kept_by_git("--others") | {"PKG-INFO"}


def test_the_wheel_is_the_package_and_the_configs(unpacked: tuple[Path, Path]) -> None:
    def expected(names: set[str]) -> set[str]:
        package = {name.removeprefix("src/") for name in names if name.startswith("src/")}
        return package | {f"tutti/{name}" for name in names if name.startswith("configs/")}

    found = {name for name in files_of(unpacked[1]) if ".dist-info/" not in name}
    assert expected(kept_by_git()) <= found <= expected(kept_by_git("--others"))


def test_the_readme_of_the_package_has_no_link_or_picture_that_leads_nowhere(
    unpacked: tuple[Path, Path],
) -> None:
    described = email.message_from_bytes((unpacked[0] / "PKG-INFO").read_bytes())
    assert described["Description-Content-Type"] == "text/markdown"
    text = described.get_payload(decode=True)
    assert isinstance(text, bytes)
    page, original = text.decode(), (ROOT / "README.md").read_text(encoding="utf-8")
    assert [link for link in LINK.findall(page) if not link.startswith("https://")] == []
    assert CODE.findall(page) == CODE.findall(original)
    assert {link for link in LINK.findall(original) if link.startswith("https://")} == {*LINK.findall(page)}


@pytest.mark.parametrize("home", ["", "https://git.example/team/tutti/"])
def test_a_release_names_the_addresses_of_its_repository_and_nothing_else_does(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUTTI_REPOSITORY", home)
    found = ProjectMetadata(str(ROOT), PluginManager()).core.urls
    assert bool(found) == bool(home)
    for name, address in found.items():
        page = address.removeprefix(home.rstrip("/"))
        assert page != address and (
            "/blob/main/" not in page or (ROOT / page.removeprefix("/blob/main/")).is_file()
        )
        assert name in ("Repository", "Documentation", "Changelog", "Issues")
    monkeypatch.setenv("TUTTI_REPOSITORY", "git.example/team")
    with pytest.raises(ValueError, match="expected https://HOST/OWNER/NAME"):
        _ = ProjectMetadata(str(ROOT), PluginManager()).core.urls


WITHOUT_A_CHECKOUT = """
import json, sys
from pathlib import Path
import tutti
from typer.testing import CliRunner
from tutti.cli.app import app
from tutti.cli.commands import load
from tutti.config.files import config_file
from tutti.config.run_config import build_config
from tutti.studies.config import load_study

found = {}
for name in json.loads(sys.argv[1]):
    short = Path(name).with_suffix("")
    if name.startswith("studies/"):
        study = load_study(config_file(Path(short.name), study=True))
        found[name] = [study.name, build_config(study.base, name).name]
    elif name.startswith("vlm/"):  # it names the folder of a model, which is nowhere here
        found[name] = [config_file(Path(short.name)).stem]
    else:
        found[name] = [load(Path(short.name), []).name]
said = [CliRunner().invoke(app, line.split()) for line in ("configs", "configs demo", "train nowhere.yaml")]
print(json.dumps([tutti.__file__, found, [one.output for one in said]]))
"""


def test_a_wheel_alone_knows_its_configs_by_name(unpacked: tuple[Path, Path], tmp_path: Path) -> None:
    """Every one is valid, a study finds its base; the list names all, as the answer to a wrong name does."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_CHECKOUT, json.dumps(shipped_names())],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked[1]), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    package, found, (listed, demo, wrong) = json.loads(done.stdout)
    assert Path(package).is_relative_to(unpacked[1])
    assert len(found) >= 12
    assert found["studies/e1.yaml"] == ["e1", "experiments"] and found["plans/3b.yaml"] == ["plan-3b"]
    assert found["smoke.yaml"] == ["smoke"] and found["studies/smoke.yaml"] == ["smoke", "smoke"]
    assert demo == (ROOT / "configs" / "demo.yaml").read_text(encoding="utf-8")
    assert all(f"{name}\n    " in listed and name in wrong for name in found)
