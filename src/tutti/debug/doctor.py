"""`tutti doctor CONFIG`: checks data, model, gradients and the first updates before a training is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from tutti.config.run_config import RunConfig
from tutti.data.bundle import DataBundle
from tutti.data.checks.ridge import Leak, leak_findings, measure_leak
from tutti.debug.gradient_checks import (
    GradientShares,
    at,
    first_updates,
    gradient_shares,
    judge_shares,
    phase_tables,
)
from tutti.debug.text_dependence import TextTest, check_text
from tutti.debug.tower_checks import check_towers
from tutti.findings import Finding
from tutti.models.vla import VLA
from tutti.report.formatting import percent
from tutti.report.judges import FEATURES, unhealthy_features
from tutti.report.records import single_step
from tutti.runs.build import BuiltTraining, require_data, training_threads, trial_training
from tutti.runs.data_check import check_training_data
from tutti.runs.data_inspect import print_robots
from tutti.runs.label_shares import LabelShares, label_shares
from tutti.runs.screened_rates import rate_findings
from tutti.runs.terminal import print_findings, print_line, print_table, progress_bar
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import checkpoints
from tutti.training.diagnostics.measures import feature_measures
from tutti.training.diagnostics.reach import ReachTable
from tutti.training.update import Update
from tutti.types import Batch, DataSpec, Features, Tokens, UserError

UPDATES = 100
BATCHES = 4
SAMPLES = 64
"""Windows for the feature checks, at least: a small batch size does not look like a collapse."""
PARTS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Every table and finding of the doctor, and the `spec` of the data. `features` are the feature measures
    by the model examined, `towers` lines about pre-trained parts."""

    reach: Sequence[tuple[str, ReachTable]]
    shares: Sequence[GradientShares]
    features: Mapping[str, Mapping[str, float]]
    text: TextTest | None
    leak: Leak
    labels: LabelShares
    spec: DataSpec
    findings: Sequence[Finding]
    towers: Sequence[str] = ()

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The faults and warnings, which make the exit code 1; empty if nothing is wrong."""
        return tuple(finding for finding in self.findings if finding.is_problem)


def run_doctor(config: RunConfig, folder: Path | None = None, *, updates: int = UPDATES) -> Diagnosis:
    """Builds data, model and objective as `tutti train` would and examines them, and the newest checkpoint.

    Nothing is written into the run's folder.

    Raises: UserError if there are no data yet, or anything that `tutti train` would raise at its start.
    """
    folder = folder or Path("runs") / config.name
    require_data(config, folder)
    kept = checkpoints(folder)
    with training_threads(config), trial_training(config, folder) as training:
        found = examine(training, updates=updates, checkpoint=kept[-1] if kept else None)
    return replace(found, findings=(*found.findings, *rate_findings(config, folder)))


def examine(training: BuiltTraining, *, updates: int = UPDATES, checkpoint: Path | None = None) -> Diagnosis:
    """Runs every check. `training` is used up: `updates` updates are made with it."""
    config, data, model = training.config, training.data, training.model
    updates = min(updates, config.training.steps)
    findings: list[Finding] = []
    with progress_bar("examining") as bar:
        findings += check_training_data(config, data)
        leak = measure_leak(data)
        bar(1, PARTS)
        text, text_findings = check_text(data, config.seed)
        findings += leak_findings(leak, data.spec) + text_findings
        bar(2, PARTS)
        needed = -(-SAMPLES // config.data.batch_size)
        taken = [data.train.batch_at(number) for number in range(max(BATCHES, needed))]
        given = [batch.to(training.trainer.machine.device) for batch in taken]
        batches, samples = given[:BATCHES], given[:needed]
        towers, tower_findings = check_towers(training, given[0])
        findings += tower_findings
        tables, reach_findings = phase_tables(training, batches)
        findings += reach_findings
        bar(3, PARTS)
        when = "at initialisation"
        features = {when: check_features(model, samples)}
        trainer, first = training.trainer, given[: config.training.accumulation_at(0)]
        # Lambdas as the training will begin with.
        trainer.calibration.after_batches(
            Update(step=0, point=trainer.strategy.at(0), active_terms=(), batches=first)
        )
        shares = [gradient_shares(training, batches, when, at_end=False)]
        failures = first_updates(training, updates)
        findings += failures
        bar(4, PARTS)
        if not failures:
            when = f"after {updates} updates" if updates else when
            features[when] = check_features(model, samples)
            shares.append(gradient_shares(training, batches, when, at_end=True))
            findings += judge_shares(config, *shares)
        bar(5, PARTS)
        if checkpoint is not None:
            trained = _load_same_data(checkpoint, config, data)
            if isinstance(trained, Finding):
                findings.append(trained)
            else:
                features[f"in {checkpoint.name}"] = check_features(trained, taken[:needed])
        for when, measures in features.items():
            findings += [at(when, one) for one in unhealthy_features(single_step(measures), {})]
        bar(6, PARTS)
    return Diagnosis(
        reach=tables,
        shares=tuple(shares),
        features=features,
        text=text,
        leak=leak,
        labels=label_shares(config, data),
        spec=data.spec,
        findings=tuple(findings),
        towers=towers,
    )


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """The tables, the hints, and last the problems or that there are none."""
    diagnosis.labels.print()
    print_robots(diagnosis.spec.embodiments, diagnosis.spec.robots)
    for line in diagnosis.towers:
        print_line(line)
    for phase, table in diagnosis.reach:
        heads, *rows = table.rows()
        print_table(
            f"Reach, phase '{phase}': norm of each raw term's gradient (. none)", heads, rows, narrow=True
        )
    for shares in diagnosis.shares:
        gradient, terms = shares.by_part("share"), shares.terms
        heads = ("part", *(f"{term} x {shares.lambdas[term]:g}" for term in terms))
        rows = [
            (
                part,
                *(f"{percent(of_update.get(t, 0), 1)} ({percent(gradient[part].get(t, 0))})" for t in terms),
            )
            for part, of_update in shares.by_part("update_share").items()
        ]
        title = f"Shares of the update (of the gradient) {shares.when}, of a step by {BATCHES} batches"
        print_table(title, heads, rows, narrow=True)
    rows = []
    for when, measures in diagnosis.features.items():
        for name in (name for name in FEATURES if f"dead/{name}" in measures):
            rank = f"{measures[f'rank/{name}']:.1f}" if f"rank/{name}" in measures else ""
            rows.append((name, when, f"{100 * measures[f'dead/{name}']:.0f} %", rank))
    print_table("Features", ("features", "model", "dead units", "effective rank"), rows, narrow=True)
    if diagnosis.text is not None:
        print_line(diagnosis.text.summary)
    print_line(f"State: R2 {diagnosis.leak.now:.3f} of a linear map to the next action.")
    print_findings(diagnosis.findings)
    count, hints = len(diagnosis.problems), [one for one in diagnosis.findings if not one.is_problem]
    weaker = f" The {len(hints)} hint{'s' if len(hints) > 1 else ''} above may be meant so." if hints else ""
    problems = f"{count} problem{'s' if count > 1 else ''}, marked with !."
    print_line(f"{problems if count else 'Nothing is wrong.'}{weaker}")


def _load_same_data(checkpoint: Path, config: RunConfig, data: DataBundle) -> VLA | Finding:
    """The checkpoint's model; a hint where it is of other data or cannot be read."""
    try:
        model = Policy.load(checkpoint, "raw", trust_code=config.classes).model
    except UserError as error:
        reason = str(error).splitlines()[0]
    else:
        if model.spec == data.spec:
            return model
        reason = "it was trained on other data."
    text = f"{checkpoint.name} was not examined: {reason}"
    return Finding(kind="checkpoint_skipped", severity="hint", sentence=text)


@torch.no_grad()
def check_features(model: VLA, batches: Sequence[Batch]) -> dict[str, float]:
    """`dead/*`, `rank/*` and `rank_limit/*` over all windows of `batches`, in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        features = [model(batch.observation) for batch in batches]
    finally:
        model.train(was_training)
    joined = Features(
        vision=_join([one.vision for one in features]),
        language=_join([one.language for one in features]),
        fused_vision=_join([one.fused_vision for one in features]),
        readout=torch.cat([one.readout for one in features]),
    )
    return feature_measures(joined, torch.cat([batch.instruction_id for batch in batches]))


def _join(tokens: Sequence[Tokens]) -> Tokens:
    """The tokens of all batches, those of shorter texts padded."""
    most = max(part.mask.shape[1] for part in tokens)
    beyond = [(0, most - part.mask.shape[1]) for part in tokens]
    return Tokens(
        values=torch.cat([F.pad(one.values, (0, 0, *end)) for one, end in zip(tokens, beyond, strict=True)]),
        mask=torch.cat([F.pad(one.mask, end) for one, end in zip(tokens, beyond, strict=True)]),
    )
