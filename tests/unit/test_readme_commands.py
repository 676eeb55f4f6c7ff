"""The blocks of README and tutorials: what is run of them, and that each can be run as it is printed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

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
tutti compare all  # takes hours
```
<!-- commands: with training.steps=2 -->
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
    assert [(one.line, bool(one.reason), one.file) for one in found] == [
        ("echo one two            # both words", False, ""),
        (". ./activated    # holds from here on", False, ""),
        ("tutti compare all  # takes hours", True, ""),
        ("tutti train mine.yaml training.steps=2    # ten minutes", False, ""),
        ("echo $WORD", False, ""),
        ("false", False, ""),
        ("cat mine.yaml", False, "mine.yaml"),
        ("drive --fast", True, ""),
        ("python page-block-5.py", False, "page-block-5.py"),
    ]
    with pytest.raises(UserError, match=r"page\.md, block 1: expected skip REASON, .*, found 'maybe'"):
        list(readme_commands.steps("page.md", "<!-- commands: maybe -->\n```sh\nls\n```"))


def test_they_are_run_in_turn_and_what_is_not_run_says_why(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "activated").write_text("WORD=held; tutti() { echo trained $3; }\n")
    done = readme_commands.run_all(readme_commands.steps("page.md", PAGE), clone)
    assert [(one.code, one.output) for one in done[:8]] == [
        *((0, "one two"), (0, ""), (None, "its comment says that it takes hours")),
        *((0, "trained training.steps=2"), (0, "held"), (1, "")),
        *((0, "name: mine"), (None, "needs a robot")),
    ]
    assert done[8].code in (0, 127)  # where the command python is missing
    assert (clone / "mine.yaml").read_text() == "name: mine\n"
    assert "[not run: needs a robot]" in readme_commands.transcript(done)


def test_commands_are_left_out_or_exchanged_only_by_name_and_the_result_says_so() -> None:
    found = [
        readme_commands.changed(one, ["false"], {"echo $WORD": "echo less"})
        for one in readme_commands.steps("page.md", PAGE)
    ]
    assert [one.line for one in found[3:6]] == [
        *("tutti train mine.yaml training.steps=2    # ten minutes", "echo less    # instead of: echo $WORD"),
        "false",
    ]
    assert [one.reason for one in found[3:6]] == ["", "", "left out by --skip"]


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
