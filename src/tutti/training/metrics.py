"""Every metric that a run can record, with its meaning; docs/metrics.md is this list for people."""

from __future__ import annotations

from fnmatch import fnmatchcase

METRICS: dict[str, str] = {
    "loss/total": "L_total = sum_i lambda_i L_i, mean over the steps since the last record.",
    "loss/*/raw": "The term L_i before its lambda, mean over the steps since the last record.",
    "loss/*/weighted": "lambda_i L_i, mean over the steps since the last record.",
    "lambda/*": "The weight lambda_i of the term in the total.",
    "metric/*": "What a term reports besides its value; its name starts with the term's. Not in the total.",
    "metric/action/chunk_l1": "Masked mean |a^ - a| of the chunk, normalised units; on held-out data only.",
    "metric/action/first_l1": "Masked mean |a^_0 - a_0| of the first action; on held-out data only.",
    "metric/align/floor": "Least value the align term can take here: mean_i log(number of positives of i).",
    "metric/align/above_floor": "The align term minus its floor: 0 is perfect.",
    "metric/align/chance": "log(number of samples): the align term of a model that knows nothing.",
    "metric/align/accuracy": "Share of samples whose best match has the same instruction, both ways, 0 to 1.",
    "metric/align/temperature": "exp(-g): what the similarities are divided by.",
    "metric/align/skipped": "Share of batches with under two distinct instructions, where align is masked.",
    "metric/recon/changed_share": "Share of future patches that changed by more than the threshold, 0 to 1.",
    "metric/recon/copy_baseline": "The recon term if the present picture were the prediction.",
    "metric/state/hold_baseline": "The state term if the hand stayed where it is.",
    "metric/state/key_l1": "The part of the state term that belongs to the next key frame.",
    "optim/lr": "Learning rate of the step: of Muon's matrices if Muon is used, else of AdamW.",
    "optim/lr_adamw": "With Muon: the learning rate of the parameters that AdamW moves.",
    "optim/lr_factor": "What the schedule multiplies every base learning rate with, 0 to 1.",
    "optim/grad_norm": "Euclidean norm of the whole gradient before clipping, mean since the last record.",
    "optim/grad_norm_max": "Largest such norm since the last record.",
    "optim/clip_share": "Share of the steps since the last record whose gradient was clipped, 0 to 1.",
    "optim/ema_decay": "Decay d of the moving average at this step: min(decay, (1 + s)/(10 + s)).",
    "strategy/phase": "Number of the strategy's phase, from 0; not recorded where there is only one.",
    "data/samples": "Training windows consumed since the start of the run.",
    "time/seconds": "Seconds spent training since the start of the run, resumed parts included.",
    "time/samples_per_second": "Windows per second since the last record, validation and saving excluded.",
    "time/data_share": "Share of that time spent waiting for a batch and moving it to the device.",
    "time/forward_share": "Share of that time in model and objective.",
    "time/backward_share": "Share of that time in the backward pass.",
    "time/optimizer_share": "Share of that time in clipping, the optimiser's step and the moving average.",
    "valid/*": "The term (or total) on held-out episodes with the averaged weights (raw ones if EMA is off).",
    "valid/metric/*": "What a term reports besides, on held-out episodes.",
    "valid_raw/*": "The term (or total) on held-out episodes with the raw weights.",
    "valid_raw/metric/*": "What a term reports besides, on held-out episodes with the raw weights.",
    "time/validation_seconds": "Seconds that the validation took.",
}
"""Every metric that a run can record, by name; `*` stands for a term (or a term's metric)."""


def describe_metric(name: str) -> str | None:
    """The description of a recorded metric, or None if METRICS has no line for it."""
    if name in METRICS:
        return METRICS[name]
    fitting = [pattern for pattern in METRICS if fnmatchcase(name, pattern)]
    return METRICS[max(fitting, key=len)] if fitting else None
