"""The tables of finished studies anew, from the successes that lie in their results: nothing is trained.

python benchmarks/rescore.py rewrites study_*.json and joint_training.json in benchmarks/results, and the
Markdown beside them: intervals and verdicts by the statistics of this version, of what was measured then.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from joint_scores import BASE, Trained, difference_table, mean_table, plain, score, task_table
from joint_training import LABELS
from tables import RESULTS

from tutti.storage.files import write_atomically
from tutti.studies.cells import Cell
from tutti.studies.cells import Trained as TrainedCell
from tutti.studies.config import StudyConfig
from tutti.studies.costs import StepCost
from tutti.studies.page import publish
from tutti.studies.scores import score_contrasts, score_study
from tutti.studies.tables import Findings


def rescore_study(path: Path) -> None:
    """A study of `tutti compare`; raises UserError where its cells were not judged on the same starts."""
    old = json.loads(path.read_text(encoding="utf-8"))
    study = StudyConfig.model_validate(old["study"])
    known = {field.name for field in fields(TrainedCell)}
    found: dict[Cell, TrainedCell] = {}
    for values in old["cells"]:
        where = {key: values[key] for key in ("arm", "level", "seed", "steps", "identity")}
        cell = Cell(**where, folder=Path(values["folder"]))
        found[cell] = TrainedCell(**{key: value for key, value in values.items() if key in known})
    scores = score_study(study, found)
    findings = Findings(
        study=study,
        data=old["data"],
        costs={arm: StepCost(**cost) for arm, cost in old["costs"].items()},
        found=found,
        missing=[],
        scores=scores,
        contrasts=score_contrasts(study, scores),
    )
    with tempfile.TemporaryDirectory() as folder:
        publish(findings, Path(folder), old["made"])
        for suffix in (".json", ".md"):
            write_atomically(path.with_suffix(suffix), (Path(folder) / f"results{suffix}").read_bytes())


def rescore_joint_training(path: Path) -> None:
    """The result of joint_training.py."""
    old = json.loads(path.read_text(encoding="utf-8"))
    trained = [Trained(**values) for values in old["trained"]]
    groups = [
        (
            before["budget"],
            [one for one in trained if (one.arm, one.steps) == (before["arm"], before["steps"])],
        )
        for before in old["scores"]
    ]
    base = next(group for budget, group in groups if group[0].arm == BASE)
    scores = [score(budget, group, base) for budget, group in groups]
    tables = [table(scores, LABELS).markdown() for table in (mean_table, difference_table, task_table)]
    title, *parts = path.with_suffix(".md").read_text(encoding="utf-8").strip().split("\n\n")
    notes = [part for part in parts if not part.startswith(("**", "|"))]
    write_atomically(path.with_suffix(".md"), "\n\n".join([title, *tables, *notes]) + "\n")
    write_atomically(path, json.dumps(old | {"scores": plain(scores)}, indent=1) + "\n")


def main(folder: Path = RESULTS) -> int:
    """Every study in the folder."""
    for path in sorted(folder.glob("study_*.json")):
        rescore_study(path)
    rescore_joint_training(folder / "joint_training.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
