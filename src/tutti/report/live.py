"""The live report: `tutti report RUN ... --serve`, on loopback, up to date while a training runs.

One address shows the curves of several runs over each other, and for each run its whole report. The page asks
every two seconds whether a file of the runs has changed, and then takes the new one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from tutti.errors import UserError
from tutti.nested_dicts import content_hash
from tutti.report.blocks import Block, Charts, Page, Section, Table, Tile, column, render, table
from tutti.report.chinese import Language, in_language
from tutti.report.formatting import duration, percent
from tutti.report.inputs import READ, Inputs, read_inputs
from tutti.report.page import report_page
from tutti.report.svg.charts import Series, line_chart

HOST = "127.0.0.1"
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")
CURVES = {
    "Losses": ("loss/total", "loss/*/raw"),
    "Held out": ("valid/*", "valid/metric/*/key_l1"),
    "Shares of the update": ("diag/update_share/*/fusion", "loss/*/lambda"),
    "Conflicts": ("diag/cosine/*/fusion", "backward/cosine/*"),
    "Optimizer": ("optim/lr", "optim/grad_norm", "time/samples_per_second"),
}
"""The sections of curves, each with the metrics that it shows."""
LOGARITHMIC = ("Losses", "Held out", "Optimizer")
"""Those whose values may span factors; shares and cosines have an end on each side."""
REFRESH = """
<script>
"use strict";
let seen = "@state@";
async function look() {
  try {
    const state = await (await fetch("state", {cache: "no-store"})).text();
    if (state !== seen) {
      const page = new DOMParser().parseFromString(await (await fetch(location.href)).text(), "text/html");
      const reached = "a, summary, [tabindex], video", focused = document.activeElement;
      const at = [...document.querySelectorAll(reached)].indexOf(focused);
      const open = [...document.querySelectorAll("details[open] > summary")].map(one => one.textContent);
      for (const part of ["header", "main"])
        document.querySelector(part).replaceWith(page.querySelector(part));
      for (const one of document.querySelectorAll("details > summary"))
        if (open.includes(one.textContent)) one.parentElement.open = true;
      document.querySelectorAll(reached)[at]?.focus({preventScroll: true});
      const again = document.createElement("script");  // what lies under the pointer, for the new elements
      again.textContent = `{${document.querySelector("script").textContent}}`;
      document.body.append(again); again.remove();
      seen = state;
    }
    document.title = document.title.replace(/ \\(offline\\)$/, "");
  } catch { document.title = document.title.replace(/( \\(offline\\))?$/, " (offline)"); }
  setTimeout(look, @wait@);
}
setTimeout(look, @wait@);
</script>
"""


class LiveReport:
    """The pages of some runs, as their files are now."""

    def __init__(self, runs: Sequence[Path], language: Language = "en") -> None:
        self.runs = list(runs)
        self.language: Language = language
        self.names = _names(self.runs)
        self._lock, self._kept = Lock(), dict[int | None, tuple[str, str]]()

    @property
    def state(self) -> str:
        """Another text whenever a file that the pages show has changed."""
        stats: list[tuple[str, int, int]] = []
        for path in sorted({path for run in self.runs for name in READ for path in run.glob(name)}):
            with suppress(OSError):  # of a run that is being deleted
                found = path.stat()
                stats.append((str(path), found.st_mtime_ns, found.st_size))
        return content_hash(stats, 16)

    def answer(self, address: str) -> tuple[int, str, str]:
        """Status, type and body of an address: / (all runs), /0/ (the report of the first), /state."""
        found = re.fullmatch(r"/(?:(\d{1,3})/)?(state)?", address.partition("?")[0])
        number = int(found[1]) if found and found[1] else None
        if not found or (number is not None and number >= len(self.runs)):
            return 404, "text/plain", "Not found"
        state = self.state
        if found[2]:
            return 200, "text/plain", state
        with self._lock:  # one thread makes a page, the others take it
            known, page = self._kept.get(number, ("", ""))
            if known != state:
                made = (
                    overlay_page(self.runs, self.names) if number is None else report_page(self.runs[number])
                )
                page = with_refresh(in_language(render(made), self.language), state)
                self._kept[number] = state, page
        return 200, "text/html", page


def serve_report(runs: Sequence[Path], port: int = 0, language: Language = "en") -> ThreadingHTTPServer:
    """A server of the live report on 127.0.0.1, to be run by `serve_forever`; port 0 is any free one.

    It answers this machine alone, reads and never writes, and knows no other files. Raises: UserError where
    the port is taken or not allowed.
    """
    live = LiveReport(runs, language)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # A page of another site must not read it through a name that leads here.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            code, kind, body = live.answer(self.path)
            if host not in (HOST, "localhost"):
                code, kind, body = 403, "text/plain", "Only by 127.0.0.1 or localhost"
            content = body.encode("utf-8")
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Says nothing of each request."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"port {port}: {error.strerror}. Take another: --port 0 is any free one.") from error


def overlay_page(runs: Sequence[Path], names: Sequence[str]) -> Page:
    """The curves of all runs over each other, and a row for each."""
    inputs = dict(zip(names, map(read_inputs, runs), strict=True))
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(names)}
    sections = [Section(id="runs", title="Runs", blocks=[_table(inputs)])]
    for title, patterns in CURVES.items():
        metrics = dict.fromkeys(
            name for pattern in patterns for one in inputs.values() for name in _named(one, pattern)
        )
        charts = [
            line_chart(
                metric,
                [
                    Series(name=name, xs=xs, ys=ys, colour=colours[name], kind="line")
                    for name, one in inputs.items()
                    for xs, ys in [one.records.get(metric)]
                    if xs
                ],
                unit="value",
                zero=False,
                log=None if title in LOGARITHMIC else False,
            )
            for metric in metrics
        ]
        missing = "" if charts else "Not recorded yet."
        blocks: list[Block] = [Charts(charts=charts, small=len(charts) > 4)] if charts else []
        sections.append(
            Section(id=title.lower().replace(" ", "-"), title=title, blocks=blocks, missing=missing)
        )
    steps = max((one.records.get("loss/total")[0] or [0])[-1] for one in inputs.values())
    return Page(
        kicker="Tutti: live report",
        name=", ".join(names),
        result="",
        tiles=[
            Tile(value=str(len(names)), name="runs"),
            Tile(value=f"{steps:,}", name="optimizer steps"),
        ],
        notes=[],
        warnings=[],
        sections=sections,
        footer="Served by tutti report --serve; it follows the runs' files. Reports of runs: /0/, /1/, ...",
    )


def _table(inputs: dict[str, Inputs]) -> Table:
    def last(one: Inputs, metric: str) -> str:
        value = one.records.last(metric)
        return "" if value is None else f"{value:.4g}"

    def success(one: Inputs) -> str:
        if one.evaluation is None:
            return ""
        score = one.evaluation.policy
        return f"{percent(score.mean, 1)} ({score.interval.percent()})"

    rows = [(number, name, one) for number, (name, one) in enumerate(inputs.items())]
    return table(
        rows,
        [
            column("run", lambda row: f"{row[1]} (/{row[0]}/)"),
            column("step", lambda row: f"{(row[2].records.get('loss/total')[0] or [0])[-1]:,}"),
            column("loss", lambda row: last(row[2], "loss/total")),
            column("held-out action", lambda row: last(row[2], "valid/action")),
            column("training", lambda row: duration(row[2].records.last("time/seconds") or 0.0)),
            column("success, 95 %", lambda row: success(row[2])),
        ],
    )


def _named(one: Inputs, pattern: str) -> list[str]:
    if "*" not in pattern:
        return [pattern] if pattern in one.records else []
    return [pattern.replace("*", found[0]) for found in one.records.named(pattern) if "@" not in found[0]]


def _names(runs: Sequence[Path]) -> list[str]:
    """The folders' names, with those above where two are the same."""
    names = [run.resolve().name for run in runs]
    return [
        name if names.count(name) == 1 else "/".join(run.resolve().parts[-2:])
        for name, run in zip(names, runs, strict=True)
    ]


def with_refresh(page: str, state: str, seconds: float = 2) -> str:
    """The page with the script that asks for news, which alone may ask this server: it takes the page again
    when the text at `state` has become another one."""
    page = page.replace("default-src 'none';", "default-src 'none'; connect-src 'self';", 1)
    head, end, tail = page.rpartition("</body>")
    script = REFRESH.replace("@state@", state).replace("@wait@", f"{1000 * seconds:.0f}")
    return head + script + end + tail
