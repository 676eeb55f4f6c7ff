"""What the site adds to the pages in docs/: their order, the generated references, files of the repository.

The index.md of a folder lists its pages in their order, on a Git host and here. A marker such as
`<!-- generated: config -->` stands for what is drawn from the code when the site is built. A link that leaves
docs/ leads to a copy of the file, shown as a page; so the same relative links work in both places.
"""

from __future__ import annotations

import ast
import base64
import json
import logging
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS, PACKAGE = ROOT / "docs", ROOT / "src" / "tutti"
COPIES = "repository/"
"""Where the site has the repository's other files."""

MANY = 8
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
BREAK = "\n\n"
HIDDEN = "---\nsearch: {exclude: true}\n---\n\n"
TAGS = (
    "a|p|ul|ol|li|code|pre|div|span|h[1-6]|hr|table|thead|tbody|tr|th|td|em|strong|article|img|br|blockquote|"
    "button|nav|label|input|svg|path|sup|sub|autoref"
)
ODD_TAG = re.compile(rf"<(?!(?:{TAGS})\b)[a-z]\w*")
SHOWN = {".md": "", ".py": "python", ".yaml": "yaml", ".yml": "yaml", ".cff": "yaml", ".toml": "toml"}
SHOWN |= {".json": "json", ".sh": "bash", ".txt": "text", "": "text"}
"""Files that are shown as a page, and the language of their text; any other is copied as it is."""
log = logging.getLogger("mkdocs.hooks.tutti")  # strict: a warning fails the build


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The order of the pages is that of the links in each index.md."""
    _, *sections = _nav("index.md", {uri: title for uri, title, _ in _generated()})
    config.nav = [{"Home": "index.md"}, *sections]
    return config


def _nav(index: str, generated: dict[str, str]) -> list[Any]:
    folder = posixpath.dirname(index)
    entries: list[Any] = [index]
    for title, target in re.findall(
        r"(?<!!)\[([^]]+)\]\(([^)#\s:]+)\)", (DOCS / index).read_text(encoding="utf-8")
    ):
        uri = posixpath.normpath(posixpath.join(folder, target))
        if uri.startswith(folder) and (DOCS / uri).exists():  # a broken link is told when the page is read
            entries.append({title: _nav(uri, generated) if uri.endswith("index.md") else _page_uri(uri)})
    return entries + [{name: uri} for uri, name in generated.items() if posixpath.dirname(uri) == folder]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and files of the repository that pages link to, and what these link to."""
    for uri, _, text in _generated():
        files.append(File.generated(config, uri, content=text))
    for path in sorted(DOCS.rglob("*.ipynb")):
        uri = _page_uri(path.relative_to(DOCS).as_posix())
        files.append(File.generated(config, uri, content=_notebook(json.loads(path.read_text("utf-8")))))
    waiting = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while waiting:
        here, text = waiting.pop()
        for target in _leaving(here, text):
            if files.get_file_from_path(_site_uri(target)) is None and (ROOT / target).is_file():
                if (language := SHOWN.get(Path(target).suffix)) is None:
                    files.append(File.generated(config, _site_uri(target), abs_src_path=str(ROOT / target)))
                    continue
                content = (ROOT / target).read_text(encoding="utf-8")
                shown = f"# {target}\n\n````{language}\n{content}\n````\n" if language else content
                files.append(File.generated(config, _site_uri(target), content=HIDDEN + shown))
                waiting += [] if language else [(target, content)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fills in what is generated, and turns links to the repository's files into links to their copies."""
    uri = page.file.src_uri
    here = uri.removeprefix(COPIES) if uri.startswith(COPIES) else f"docs/{uri}"
    markdown = re.sub("<!-- generated: (.*) -->", _fill, markdown)
    if page.is_homepage:
        page.meta["hide"] = ["navigation", "toc"]

    def led(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[2]))
        if not (ROOT / target).is_file() and target.startswith("docs/"):
            return found[0]  # a generated page, or a mistake that mkdocs tells
        return found[1] + posixpath.relpath(_page_uri(_site_uri(target)), posixpath.dirname(uri)) + found[3]

    return LINK.sub(led, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Tells Markdown that a Git host understands and Python-Markdown shows as it was typed."""
    if odd := set(ODD_TAG.findall(html)):
        log.warning(f"{page.file.src_uri}: {odd} was read as HTML and is not shown: it needs backticks")
    for text in re.findall(r"<p>(.*?)</p>", html, re.DOTALL):
        if re.search(r"```|^\| |^\s*[-*] |^\d+\. ", text, re.MULTILINE):
            log.warning(f"{page.file.src_uri}: a list, table or fence is shown as text: {text[:100]!r}")


def _fill(found: re.Match[str]) -> str:
    """What stands for a marker: the commands, or the generated pages beside it."""
    if found[1] == "cli":
        return _commands()
    return "\n".join(
        f"* [`{title}`]({posixpath.basename(uri)}): {text.split(BREAK)[1]}"
        for uri, title, text in _generated()
        if uri.startswith(f"reference/{found[1]}/")
    )


def _leaving(here: str, text: str) -> Iterator[str]:
    """The repository's files outside of docs/ that a page links to, by their paths from the root."""
    for found in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), found[2]))
        if not target.startswith(("docs/", "..")):
            yield target


def _site_uri(target: str) -> str:
    """Where the site has a file of the repository."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return COPIES + target + (".md" if SHOWN.get(Path(target).suffix) else "")


@cache
def _generated() -> list[tuple[str, str, str]]:
    """(place, title, text) of the pages that no file in docs/ has."""
    return [*_config_pages(), *_python_pages()]


def _page_uri(uri: str) -> str:
    """Where the site has a page; a notebook is one too."""
    return re.sub(r"\.ipynb$", ".md", uri)


def _notebook(notebook: dict[str, Any]) -> str:
    """A notebook as a page: its texts, its code, and the outputs that are stored in it."""
    blocks: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        blocks.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for one in cell.get("outputs", ()):
            data = {kind: "".join(content) for kind, content in one.get("data", {}).items()}
            if "image/png" in data:
                blocks.append(_picture("image/png", data["image/png"].strip()))
            elif "image/svg+xml" in data:
                drawn = base64.b64encode(data["image/svg+xml"].encode()).decode()
                blocks.append(_picture("image/svg+xml", drawn))
            elif said := "".join(one.get("text", ())) or data.get("text/plain", ""):
                blocks.append(f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(blocks) + "\n"


def _picture(kind: str, content: str) -> str:
    return f'<img alt="output of the cell above" src="data:{kind};base64,{content}">'


# The commands --------------------------------------------------------------------------------------------


@cache
def _commands() -> str:
    import typer.main
    from typer.cli import get_docs_for_click

    from tutti.cli.app import app

    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command, info_name="tutti"), name="tutti")
    text = text[text.index("\n## ") :]  # before it: what `tutti --help` shows, in the marks of a terminal
    return re.sub(r"docs/(\S+\.md)", lambda found: f"[{_title(found[1])}](../{found[1]})", text)


def _title(uri: str) -> str:
    return (DOCS / uri).read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")


# The config ----------------------------------------------------------------------------------------------


def _config_pages() -> Iterator[tuple[str, str, str]]:
    """A page for each section, from the schema that `tutti schema` prints."""
    from tutti.config import RunConfig, json_schema

    schema, defaults = json_schema(), RunConfig().model_dump(mode="json")
    for name, value in schema["properties"].items():
        if isinstance(defaults.get(name), dict | list):
            page = _Section(name, schema["$defs"], defaults)
            yield f"reference/config/{name}.md", name, page.text({**value, **value.get("items", {})})


class _Section:
    """The keys of one section: a table for each class of the config, each class once."""

    def __init__(self, name: str, classes: dict[str, Any], defaults: dict[str, Any]) -> None:
        self.name, self.classes, self.defaults = name, classes, defaults
        self.anchors: dict[str, str] = {}  # of a class, and of a choice of many classes
        self.waiting: list[tuple[str, str, str, str]] = []  # anchor, heading, key, class

    def text(self, value: dict[str, Any]) -> str:
        blocks = [f"# {self.name}", value["description"]]
        if "$ref" in value:
            blocks += self._table(self.name, value["$ref"])
        else:
            default = self._default(self.name, value, required=False)
            blocks += [f"`kind` is {self._type(self.name, value)}; {default} unless given."]
        while self.waiting:
            anchor, heading, path, reference = self.waiting.pop(0)
            blocks += [f"## {heading} {{ #{anchor} }}", *self._table(path, reference)]
        return BREAK.join(blocks) + "\n"

    def _table(self, path: str, reference: str) -> list[str]:
        found = self.classes[reference.rpartition("/")[2]]
        required = found.get("required", ())
        rows = []
        more = found.get("additionalProperties")
        further = self._type(f"{path}.NAME", more) if isinstance(more, dict) else ""
        for key, value in found["properties"].items():
            if key != "kind" or "pattern" in value:  # else the heading has it
                place = f"{path}.{key}"
                cells = [f"`{key}`", self._type(place, value), self._default(place, value, key in required)]
                cells += [_range(value), _cell(value.get("description", ""))]
                rows.append(f"| {' | '.join(cells)} |")
        if further:
            rows.append(f"| any other | {further} | | | |")
        head = ["| key | type | default | range | meaning |\n|---|---|---|---|---|"]
        return [found["description"], "\n".join(head + rows)] if rows else [found["description"]]

    def _type(self, path: str, value: dict[str, Any]) -> str:
        """In words; a class is a link to its table, which is added where it is new."""
        if "$ref" in value:
            return self._link(path, value["$ref"])
        if union := value.get("oneOf", value.get("anyOf")):
            said = " or ".join(dict.fromkeys(self._type(path, one) for one in union))
            return said if len(union) < MANY else self._once(said)
        if "const" in value:
            return f"`{value['const']}`"
        named = {"boolean": "true, false", "string": "text"}
        kind = named.get(value.get("type", ""), value.get("type", ""))
        if kind == "array":
            kind = f"list of {self._type(path, value.get('prefixItems', [value.get('items')])[0])}"
        elif isinstance(more := value.get("additionalProperties"), dict):
            kind = f"mapping to {self._type(path, more)}"
        return kind

    def _once(self, kinds: str) -> str:
        """A choice of many kinds is listed where it comes first."""
        first = kinds[kinds.index("(") + 1 : kinds.index(")")]
        if kinds in self.anchors:
            return f"[a kind]({first})"
        self.anchors[kinds] = first
        return kinds

    def _default(self, path: str, value: dict[str, Any], required: bool) -> str:
        """Of a choice of kinds the kind, and what differs from its own defaults, which its table has."""
        if required:
            return "needed"
        found: Any = self.defaults
        for key in path.split("."):
            found = found.get(key, {}) if isinstance(found, dict) else {}
        if "default" in value and not found:
            found = value["default"]
        if isinstance(found, dict) and "kind" in found:
            kinds = [one["properties"] for one in self.classes.values() if "kind" in one["properties"]]
            own = next((one for one in kinds if one["kind"].get("const") == found["kind"]), {})
            differs = {key: one for key, one in found.items() if one != own.get(key, {}).get("default")}
            found = found["kind"] if "$ref" in value or not differs else {"kind": found["kind"], **differs}
        if isinstance(found, dict) and ("$ref" in value or "default" not in value):
            return ""
        if not isinstance(found, str):
            found = yaml.safe_dump(found, default_flow_style=True, sort_keys=False, width=10**6)
        return f"`{_cell(found.replace(f'{chr(10)}...', '').strip())}`"

    def _link(self, path: str, reference: str) -> str:
        kinds = self.classes[reference.rpartition("/")[2]]["properties"].get("kind")
        names = kinds.get("enum", [kinds.get("const", "MODULE:CLASS")]) if kinds else []
        if reference not in self.anchors:
            self.anchors[reference] = "-".join([path, *names[:1]]).replace(":", "-")
            heading = f"`{path}`" + (f", kind {' or '.join(f'`{name}`' for name in names)}" if names else "")
            self.waiting.append((self.anchors[reference], heading, path, reference))
        return f"[{' or '.join(f'`{name}`' for name in names) or 'keys'}](#{self.anchors[reference]})"


def _range(value: dict[str, Any]) -> str:
    """Of a number, a text or a list; of a union that of each of its members that has one."""
    if union := value.get("anyOf", value.get("oneOf")):
        return "; ".join(dict.fromkeys(filter(None, map(_range, union))))
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    words = {"minimum": "from {}", "exclusiveMinimum": "above {}", "maximum": "to {}"}
    words |= {"exclusiveMaximum": "below {}"}
    said = [said.format(value[key]) for key, said in words.items() if key in value]
    least, most = value.get("minItems"), value.get("maxItems")
    if least == most is not None:
        said.append(f"{least} items")
    elif least is not None:
        said.append(f"{least} or more items" if most is None else f"{least} to {most} items")
    if (items := value.get("items")) and (each := _range(items)):
        said.append(f"each {each}")
    return ", ".join(said) if value.get("type") == "array" else " ".join(said)


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("\n", " ")


# The public names ----------------------------------------------------------------------------------------


def _python_pages() -> Iterator[tuple[str, str, str]]:
    """A page for each package, of the names that its `__init__.pyi` exports; a name is described once."""
    homes: dict[str, str] = {}
    for stub in sorted(PACKAGE.rglob("__init__.pyi"), key=lambda stub: stub.parts):
        package = ".".join(stub.relative_to(PACKAGE.parent).parent.parts)
        names = [
            f"{package if node.level == 1 else ''}.{node.module}.{alias.name}"
            for node in ast.parse(stub.read_text(encoding="utf-8")).body
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        ]
        known = [f"[`{name.rpartition('.')[2]}`][{name}]" for name in names if name in homes]
        blocks = [f"# {package}", _first_line(stub)]
        blocks += [f"Also here: {', '.join(known)}."] if known else []
        blocks += [f"::: {name}" for name in names if name not in homes]
        homes |= dict.fromkeys(names, package)
        yield f"reference/python/{package}.md", package, BREAK.join(blocks) + "\n"


def _first_line(stub: Path) -> str:
    source = stub.with_suffix(".py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").split(BREAK)[0]
