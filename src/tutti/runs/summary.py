"""What there is to tell: summary.json for machines (docs/summary.md), the closing tables for people."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from tutti.distributed.cores import usable_cores
from tutti.evaluation.closed_loop.results import EvaluationResult
from tutti.evaluation.statistics.intervals import Interval, wilson
from tutti.models.describe import Description
from tutti.runs.folder import RunFolder
from tutti.runs.terminal import console, print_line
from tutti.storage.reading import read_json, shown
from tutti.types import UserError

PACKAGES = ("tutti-vla", "torch", "numpy", "pyarrow", "av", "tokenizers", "metaworld", "mujoco")


def write_summary(run: RunFolder) -> dict[str, Any]:
    """Writes summary.json from what the run's folder holds, and gives it back."""
    try:
        config = run.config().model_dump(mode="json")
    except UserError as error:
        print_line(f"config.yaml is left out: {error}")
        config = {"name": run.path.resolve().name}
    summary = {
        "name": config["name"],
        "seconds": round(sum(run.seconds.values()), 1),
        "stage_seconds": run.seconds,
        **_success(run.path / "evaluation" / "results.json"),
        "open_loop": _json(run.path / "evaluation" / "open_loop.json"),
        "config": config,
        "versions": versions(),
        "machine": machine(),
        "commit": commit(),
    }
    run.write_json("summary.json", summary)
    return summary


def print_summary(summary: dict[str, Any], run: Path) -> None:
    """Success per task with its interval and controls, where the time went, and where the report is."""
    controls = summary["controls"]
    if summary["success"]:
        table = _table(f"Success in the simulator: {summary['name']}")
        table.add_column("task", no_wrap=True)
        for head in ("success", "95 %", *(name.replace("_", " ") for name in controls)):
            table.add_column(head, justify="right")
        for task, (successes, episodes) in summary["success"].items():
            others = (_fraction(counts.get(task)) for counts in controls.values())
            bounds = wilson(successes, episodes).percent()
            table.add_row(task, f"{successes}/{episodes}", bounds, *others)
        table.add_section()
        mean = {**summary["mean"]}
        rate = mean.pop("rate")
        means = (f"{100 * _mean(counts):.0f} %" for counts in controls.values())
        table.add_row("task mean", f"{100 * rate:.1f} %", Interval(**mean).percent(), *means)
        console.print(table)
    times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in summary["stage_seconds"].items())
    print_line(f"Time: {_duration(summary['seconds'])} ({times})")
    print_line(f"Report: {run / 'report.html'}")


def print_model(description: Description) -> None:
    """A table of the modules with parameters and FLOPs of one sample forward, and the token sequence."""
    table = _table("Model")
    table.add_column("module")
    for head in ("parameters", "FLOPs per sample", "share"):
        table.add_column(head, justify="right")
    for row in description.modules:
        name = "  " * row.depth + row.name
        table.add_row(name, f"{row.parameters:,}", f"{row.flops:,}", f"{100 * row.share:.1f} %")
    console.print(table)
    parts = " | ".join(f"{row.name} {row.tokens}" for row in description.tokens)
    print_line(f"Tokens of the fusion: {parts} = {sum(row.tokens for row in description.tokens)} tokens")
    print_line(
        "FLOPs are those of one prediction, counted by torch's counter. Where the action decoder predicts in "
        "one pass, a training step costs about three times as much; one that samples counts every pass here."
    )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that shape a result; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Where it ran: system, processor, and the cores that this process may use."""
    return {"system": platform.platform(), "processor": _processor(), "cores": usable_cores()}


def commit() -> str | None:
    """The git commit of Tutti's own checkout, "+" added if its files were changed; None outside one."""
    package = Path(__file__).resolve().parents[1]
    tracked = _git(package, "ls-files", "--error-unmatch", "__init__.py")
    head = _git(package, "rev-parse", "HEAD") if tracked is not None else None
    return None if head is None else head + ("+" if _git(package, "status", "--porcelain", ".") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def _json(path: Path) -> dict[str, Any]:
    """The object in a file of the run; a torn or foreign one is left out, and said."""
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except UserError as error:
        print_line(f"left out: {error}")
        return {}


def _success(path: Path) -> dict[str, Any]:
    """The success rates of results.json; empty if there is no such file or it has another form."""
    nothing = {"success": {}, "mean": None, "controls": {}, "verdicts": {}}
    values = _json(path)
    try:
        result = EvaluationResult.from_dict(values) if values else None
    except (KeyError, TypeError, ValueError) as error:
        print_line(
            f"{path} is left out, it has another form ({type(error).__name__}: {shown(str(error), 300)})"
        )
        return nothing
    if result is None:
        return nothing
    return {
        "success": result.policy.counts,
        "mean": {"rate": result.policy.mean, **asdict(result.policy.interval)},
        "controls": {condition: score.counts for condition, score in result.controls.items()},
        "verdicts": {verdict.control: verdict.outcome for verdict in result.verdicts},
    }


def _fraction(pair: list[int] | None) -> str:
    return f"{pair[0]}/{pair[1]}" if pair else ""


def _mean(counts: dict[str, list[int]]) -> float:
    return sum(k / n for k, n in counts.values()) / len(counts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
