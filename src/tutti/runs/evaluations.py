"""Which policy an evaluation judges, what is known of it, and the folder that the evaluation lies in.

RUN/evaluation/             the evaluation of a run that its report shows
RUN/evaluations/NAME/       others of the same run: another checkpoint, other starts, the raw weights
POLICY-evaluation/          of an export, or of a checkpoint outside of its run; POLICY-NAME/ by name
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tutti.config.files import require_run
from tutti.config.run_config import RunConfig, load_run_config
from tutti.data.conventions.served import Served
from tutti.evaluation.closed_loop.starts import TrainingStarts, starts_of_policy
from tutti.evaluation.folder import JudgedPolicy
from tutti.nested_dicts import content_hash
from tutti.plugin import Trust
from tutti.runs.build import starts_of_run
from tutti.runs.folder import DEFAULT, MANIFEST, OTHERS, RunFolder
from tutti.serving.factory import CheckpointPolicyFactory
from tutti.serving.prediction.place import Place as RobotPlace
from tutti.storage.checkpoint import find_checkpoint, listed
from tutti.storage.manifest import CONFIG, EXPORT
from tutti.storage.reading import shown
from tutti.storage.tensors import weights_in
from tutti.suites.environment import Suite
from tutti.suites.registry import robot_of
from tutti.types import DataSpec, UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """`checkpoint` is the policy where the user named one; None: the run's, as `evaluation.checkpoint` says.
    `run` is the run that it belongs to; None where there is none. `other`: the option for another folder."""

    run: Path | None
    checkpoint: Path | None
    folder: Path
    other: str

    @property
    def in_report(self) -> bool:
        """Whether it is the one that the report of its run shows."""
        return self.run is not None and self.folder == self.run / DEFAULT

    @property
    def config_file(self) -> Path:
        """Where the settings come from that nobody names."""
        return (self.run or self.policy()) / CONFIG

    def config(self, trust: Trust) -> RunConfig:
        """The config that the policy was made with."""
        return load_run_config(self.config_file, trust)

    def policy(self, which: int | str = "latest") -> Path:
        """The checkpoint or the export. Raises: UserError if there is none."""
        if self.checkpoint is not None:
            return self.checkpoint
        assert self.run is not None
        RunFolder(self.run, new=False).require("train", "Train first: tutti train CONFIG.")
        return find_checkpoint(self.run, which)

    def starts(self, config: RunConfig) -> TrainingStarts:
        """The starts that the policy was trained on, as its run says, or else its own starts.json.

        Raises: UserError, naming the file, if it cannot be read.
        """
        return starts_of_policy(self.policy()) if self.run is None else starts_of_run(self.run, config)


def place_of(policy: Path, name: str | None = None, to: Path | None = None) -> Place:
    """The policy in a run's folder, a checkpoint's or an export's, and where its evaluation `name` lies.

    Raises: UserError, if there is no policy, or the name is none.
    """
    if name is not None and to is not None:
        raise UserError(f"--name {name} and --to {to} both name the evaluation's folder. Give one of them.")
    if name is not None and not NAME.fullmatch(name):
        raise UserError(
            f"--name {shown(name)}: expected letters, digits, '.', '_' and '-', such as raw-weights."
        )
    require_run(policy)
    if (policy / MANIFEST).is_file():
        run, checkpoint = policy, None
    else:
        checkpoint = find_checkpoint(policy).absolute()
        home = checkpoint.parent.parent
        inside = checkpoint.parent.name == "checkpoints" and (home / MANIFEST).is_file()
        run, name = (home, name or checkpoint.name) if inside else (None, name or DEFAULT)
    if run is not None:
        folder = run / DEFAULT if name in (None, DEFAULT) else run / OTHERS / name
    else:
        assert checkpoint is not None
        folder = checkpoint.with_name(f"{checkpoint.name}-{name}")
    other = "--name NAME" if to is None else "--to FOLDER"
    return Place(run=run, checkpoint=checkpoint, folder=folder if to is None else to, other=other)


def played_as(spec: DataSpec, served: Served | None, suite: Suite) -> DataSpec:
    """What a policy takes and gives as the robot of `suite`, as `Policy.load` says: the numbers and times of
    the source that it answers like. Those of `spec`, which are learned, are others where conventions or
    rates differ.

    Raises: UserError if the policy was not trained on this robot.
    """
    return RobotPlace.of(spec, robot_of(spec, suite) or spec.embodiments[0], served, 0).spec


def judged_policy(factory: CheckpointPolicyFactory) -> JudgedPolicy:
    """What the evaluation notes of its policy.

    Raises: UserError, if `factory.weights` are the raw ones and an export holds none.
    """
    manifest = listed(factory.path)
    table, step = manifest.table, manifest.table.get("step")
    weights, _ = weights_in(manifest, factory.weights)
    if manifest.name == EXPORT:
        weights = table.get("weights", weights)
        if (factory.weights, weights) == ("raw", "ema"):
            raise UserError(
                f"{factory.path}: evaluation.weights is raw, but this export holds the moving average "
                "alone. Set evaluation.weights=ema, or export the raw ones: tutti export RUN --weights raw."
            )
    return JudgedPolicy(
        checkpoint=str(
            table.get("checkpoint") or (f"step-{step:06d}" if type(step) is int else factory.path.name)
        ),
        weights=str(weights),
        files=content_hash(manifest.files, 16),
        fingerprint=factory.fingerprint,
    )
