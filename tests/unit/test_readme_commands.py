"""The blocks of README and tutorials: what is run of them, and that each can be run as it is printed."""

from __future__ import annotations

import ast
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import readme_commands

from tutti.config.run_config import load_config
from tutti.types import UserError

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "README.zh-CN.md", "docs/zh/index.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted((ROOT / "docs/start").glob("*.md"))]

PAGE = """
```sh
# a line that only explains
echo one \\
  two            # both words
. ./activated    # holds from here on
```
<!-- commands: shorten tutti train mine.yaml => tutti train mine.yaml training.steps=2 -->
```sh
tutti train mine.yaml    # ten minutes
echo $WORD
false
```
<!-- commands: file mine.yaml -->
```yaml
name: mine
```
<!-- commands: skip needs a robot -->
```sh
drive --fast
```
```python
print("from " + "python")
```
```text
$ not a command
```
"""


def test_blocks_become_lines_files_and_reasons() -> None:
    found = list(readme_commands.steps("page.md", PAGE))
    assert [(one.line, one.instead, bool(one.reason), one.file) for one in found] == [
        ("echo one two            # both words", "", False, ""),
        (". ./activated    # holds from here on", "", False, ""),
        ("tutti train mine.yaml    # ten minutes", "tutti train mine.yaml training.steps=2", False, ""),
        ("echo $WORD", "", False, ""),
        ("false", "", False, ""),
        ("cat mine.yaml", "", False, "mine.yaml"),
        ("drive --fast", "", True, ""),
        ("python page-block-5.py", "", False, "page-block-5.py"),
    ]
    for mistake in ("maybe", "shorten lost => ls"):  # the second shortens a line that is not there
        told = rf"page\.md, block 1: expected skip REASON, .*, found '{mistake}'"
        with pytest.raises(UserError, match=told):
            list(readme_commands.steps("page.md", f"<!-- commands: {mistake} -->\n```sh\nls\n```"))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "clone").mkdir()
    (tmp_path / "clone" / "activated").write_text("WORD=held; tutti() { echo trained $3; }\n")
    return tmp_path / "clone"


def test_they_are_run_in_turn_and_what_is_not_run_says_why(clone: Path) -> None:
    todo = list(readme_commands.steps("page.md", PAGE))
    done = list(readme_commands.run_all(todo, clone))
    assert [(one.code, one.output) for one in done[:7]] == [
        *((0, "one two"), (0, ""), (0, "trained training.steps=2"), (0, "held"), (1, "")),
        *((0, "name: mine"), (None, "needs a robot")),
    ]
    assert done[7].code in (0, 127)  # where the command python is missing
    assert (clone / "mine.yaml").read_text() == "name: mine\n"
    said = readme_commands.transcript(done)
    assert "[not run: needs a robot]" in said
    assert "# ten minutes\n[shortened: `tutti train mine.yaml training.steps=2`]\ntrained" in said


def test_a_killed_run_goes_on_behind_what_is_finished_and_refuses_another_pages_rows(clone: Path) -> None:
    todo = list(readme_commands.steps("page.md", PAGE))[:4]
    done = list(readme_commands.run_all(todo[:3], clone))
    (after,) = readme_commands.run_all(todo, clone, done)
    assert (after.command, after.output) == ("echo $WORD", "held")  # activated although that is done
    with pytest.raises(UserError, match=r"expected page\.md: \. \./activated .*Begin again"):
        list(readme_commands.run_all(todo[1:], clone, done))


def test_a_command_that_hangs_is_ended_with_its_children_and_what_it_said_is_kept(clone: Path) -> None:
    step = readme_commands.Step(page="page.md", line="echo begun; sleep 60 | sleep 61")
    (one,) = readme_commands.run_all([step], clone, limit=0.5)
    assert one.code == 124 and one.seconds < 20 and one.output.splitlines()[0] == "begun"


def test_nothing_of_this_machine_is_kept_and_of_a_progress_its_end(
    clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readme_commands.socket, "gethostname", lambda: "big-box")
    monkeypatch.setattr(readme_commands.getpass, "getuser", lambda: "jo")
    said = "\n".join(
        [
            "Looking in indexes: https://me:word@host.example/simple",
            f"in {clone}/runs/demo and /home/jo/data by jo@big-box, joint",
            *(f"training: {done}/3 after {done} s" for done in (1, 2, 3)),
            "see https://host.example/page and http://127.0.0.1:80/healthz",
        ]
    )
    assert readme_commands.scrubbed(said, clone).splitlines() == [
        "in runs/demo and <path> by <name>@<name>, joint",
        "training: 3/3 after 3 s",
        "see <address> and http://127.0.0.1:80/healthz",
    ]


def test_a_whole_run_writes_after_each_command_goes_on_when_killed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, work, output = (tmp_path / name for name in ("root", "work", "result"))
    (root / "docs" / "start").mkdir(parents=True)
    (root / "README.md").write_text(
        "```sh\nmake test\necho once >> log\n```\n<!-- commands: skip needs a robot -->\n```sh\ndrive\n```\n"
    )
    (root / readme_commands.INDEX).write_text("* [A](a.md)\n")
    (root / "docs" / "start" / "a.md").write_text("```sh\ncat log\n```\n")
    (root / "Makefile").write_text("test:\n\t@echo tested\n")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "All"]):
        subprocess.run([*git, *words], check=True)
    monkeypatch.setattr(readme_commands, "ROOT", root)

    def main(*more: str) -> int:
        return readme_commands.main(["--work", str(work), "--output", str(output), *more])

    whole = readme_commands.told

    def killed(line: str, *others: Any) -> tuple[int, str]:
        if "cat log" in line:
            raise KeyboardInterrupt
        return whole(line, *others)

    with monkeypatch.context() as patch:
        patch.setattr(readme_commands, "told", killed)
        with pytest.raises(KeyboardInterrupt):
            main()
    assert "Not finished: 2 of 4 commands" in output.with_suffix(".md").read_text()
    with pytest.raises(UserError, match="--resume goes on"):
        main()
    (root / "README.md").write_text("later pages do not matter")
    assert main("--resume") == 0 and not work.exists()
    found = json.loads(output.with_suffix(".json").read_text())
    assert [(one["command"], one["code"], one["output"]) for one in found["commands"]] == [
        ("echo once >> log", 0, ""),
        ("drive", None, "needs a robot"),
        ("cat log", 0, "once"),
        ("make test", 0, "tested"),  # nothing waits for it
    ]
    said = output.with_suffix(".md").read_text()
    assert "| README.md | `drive` | not run | 0 | needs a robot |" in said and str(tmp_path) not in said
    assert found["commit"] in said and "Not finished" not in said


def test_commands_are_left_out_or_exchanged_only_by_name_and_the_result_says_so() -> None:
    found = [
        readme_commands.changed(one, ["false"], {"echo $WORD": "echo less"})
        for one in readme_commands.steps("page.md", PAGE)
    ]
    assert [(one.instead, one.mark) for one in found[2:5]] == [
        ("tutti train mine.yaml training.steps=2", "shortened"),
        ("echo less", "exchanged by --instead"),
        ("", ""),
    ]
    assert [one.reason for one in found[2:5]] == ["", "", "left out by --skip"]


@pytest.mark.parametrize("name", PAGES)
def test_every_block_of_a_page_can_be_run(name: str, tmp_path: Path) -> None:
    """Comments are understood, configs are valid, programs compile; the fences of one page have an end."""
    text = (ROOT / name).read_text(encoding="utf-8")
    found = list(readme_commands.steps(name, text))
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
    assert found or not name.startswith("README")
    for one in found:
        if one.file.endswith(".py"):
            ast.parse(one.text)
        elif one.file.endswith(".yaml") and not one.line.startswith("cat "):
            (tmp_path / one.file).write_text(one.text, encoding="utf-8")
            load_config(tmp_path / one.file)
