"""An evaluation against another one on disk: read, compared, written beside the results, printed."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from pydantic import TypeAdapter

from tutti.evaluation.closed_loop.results import EvaluationProtocol
from tutti.evaluation.folder import AGAINST, RESULTS
from tutti.evaluation.statistics.baseline import Against, Outcomes, against
from tutti.runs.folder import DEFAULT
from tutti.storage.files import write_json
from tutti.storage.reading import read_json
from tutti.types import UserError

SAME = ("suite", "split", "max_decisions")
"""What must be the same of two evaluations, or a success is not the same in both."""
SAID = ("environment", "executed", "chunks")
"""What may differ between two policies, as the pictures that they are shown, and is said."""


def compare_with(folder: Path, baseline: Path) -> Against:
    """The evaluation in `folder` against that of `baseline`, which may be a run; writes against.json.

    Raises: UserError if one of them has no results, they share no task, or played by other rules.
    """
    other = baseline / DEFAULT if (baseline / DEFAULT / RESULTS).is_file() else baseline
    (rules, before), (own_rules, after) = _read(other), _read(folder)
    differs = {
        key: f"{key} {mine}, not {theirs}"
        for key in (*SAME, *SAID)
        if (mine := getattr(own_rules, key)) != (theirs := getattr(rules, key))
    }
    if wrong := [differs[key] for key in SAME if key in differs]:
        raise UserError(
            f"--against {baseline}: {folder} played by other rules: {'; '.join(wrong)}.\n"
            "  cure: evaluate one of them again as the other (evaluation.KEY=VALUE, and --name NAME)."
        )
    try:
        found = replace(against(before, after, str(baseline)), differs=tuple(differs.values()))
    except ValueError as error:
        raise UserError(
            f"--against {baseline}: {error} with {folder}: other tasks cannot be compared."
        ) from None
    write_json(folder / AGAINST, asdict(found))
    return found


def _read(folder: Path) -> tuple[EvaluationProtocol, Outcomes]:
    path, cure = folder / RESULTS, "Name an evaluation's folder or a run that was evaluated."
    values, outcomes = read_json(path, cure=cure), dict[str, dict[int, tuple[bool, str]]]()
    try:
        protocol = TypeAdapter(EvaluationProtocol).validate_python(values["protocol"])
        for one in values["rollouts"]:
            if one["condition"] == "policy":
                task = outcomes.setdefault(str(one["task"]), {})
                task[int(one["seed"])] = bool(one["success"]), str(one["start"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: is not the results of an evaluation ({type(error).__name__}: {error})."
        ) from None
    return protocol, outcomes
