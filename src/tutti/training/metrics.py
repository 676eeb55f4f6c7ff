"""Every metric that a run can record, with its meaning; docs/metrics.md is this list for people."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

METRICS: dict[str, str] = {
    "loss/total": "L_total = sum_i lambda_i L_i, mean over the steps since the last record.",
    "loss/*/raw": "The term L_i before its lambda, mean over the steps since the last record.",
    "loss/*/weighted": "lambda_i L_i, mean over the steps since the last record.",
    "lambda/*": "The weight lambda_i of the term in the total.",
    "metric/*": "What a term reports besides its value; its name starts with the term's. Not in the total.",
    "metric/action/chunk_l1": "Masked mean |a^ - a| of the chunk, normalised units; on held-out data only.",
    "metric/action/first_l1": "Masked mean |a^_0 - a_0| of the first action; on held-out data only.",
    "metric/*/floor": "Least value that the term can take on this batch.",
    "metric/*/above_floor": "The term minus its floor: 0 is perfect.",
    "metric/*/chance": "The term (recoverable_language: its cross-entropy) of a model that knows nothing.",
    "metric/*/accuracy": "Share of samples whose best match has the right instruction, 0 to 1.",
    "metric/*/temperature": "exp(-g): what the similarities are divided by.",
    "metric/*/bias": "b of the sigmoid term, added to the scaled similarities.",
    "metric/*/skipped": "Share of batches with too few distinct instructions or states, where the term is 0.",
    "metric/*/cross_entropy": "-log p(instruction given picture and action), mean over the windows.",
    "metric/*/vision_only_cross_entropy": "-log p(instruction given the picture alone).",
    "metric/*/vision_only_accuracy": "Share of windows whose instruction the picture alone tells, 0 to 1.",
    "metric/*/target_std": "RMS distance of the unit targets from their batch mean, 0 (collapsed) to 1.",
    "metric/*/target_rank": "Effective rank of these targets about their mean; on held-out data only.",
    "metric/*/copy_baseline": "The term if nothing changed until then; future_latent: on held-out data only.",
    "metric/*/mean_baseline": "The term if the batch's mean progress were always the answer.",
    "metric/*/l1": "Mean |y^ - y| of the predicted progress, 0 to 1.",
    "metric/*/changed_share": "Share of future patches that changed by more than the threshold, 0 to 1.",
    "metric/recon/copy_baseline": "The recon term if the present picture were the prediction.",
    "metric/*/hold_baseline": "The term if the hand stayed where it is.",
    "metric/*/key_l1": "The part of the term that belongs to the next key frame.",
    "metric/*/zero_baseline": "The term if every action were predicted as 0 in normalised units.",
    "metric/*/text_gain": "By how much the term would rise without the instruction; on held-out data only.",
    "metric/*/blind_baseline": "The term if every hidden patch were predicted as its own mean.",
    "optim/lr": "Learning rate of the step: of Muon's matrices if Muon is used, else of AdamW.",
    "optim/lr_adamw": "With Muon: the learning rate of the parameters that AdamW moves.",
    "optim/lr_factor": "What schedule and batch ramp multiply every base learning rate with, 0 to 1.",
    "optim/grad_norm": "Euclidean norm of the whole gradient before clipping, mean since the last record.",
    "optim/grad_norm_max": "Largest such norm since the last record.",
    "optim/clip_share": "Share of the steps since the last record whose gradient was clipped, 0 to 1.",
    "optim/clip_share/*": "Share of the steps whose gradient was clipped in this part (`clip_by: part`).",
    "optim/usual_norm": "Mean of the gradient's norm (clipped ones as clipped) that zclip compares with.",
    "optim/usual_norm/*": "The same in one part (`clip_by: part`).",
    "optim/accumulation": "Micro-batches of the step; recorded where the batch is to grow.",
    "optim/skipped": "Updates left out since the start of the run, for a value that was not finite.",
    "optim/rollbacks": "Times that the run has gone back to an older checkpoint since its start.",
    "optim/rollback_from": "In the event of a roll-back: the step that was left, for the record's own one.",
    "optim/fork_step": "In the first record of a fork: the step of the other run that it starts from.",
    "optim/ema_decay": "Decay d of the moving average at this step: min(decay, (1 + s)/(10 + s)).",
    "backward/weight/*": "Weight of a term's gradient in the combined one; the part's first, if by part.",
    "backward/cosine/*": "Cosine of two terms' gradients (a~b) over the shared parameters; by part likewise.",
    "strategy/phase": "Number of the strategy's phase, from 0; not recorded where there is only one.",
    "fault/damaged_checkpoints": "Damaged checkpoints set aside by the resume that went on from this step.",
    "data/samples": "Training windows consumed since the start of the run.",
    "time/seconds": "Seconds spent training since the start of the run, resumed parts included.",
    "time/samples_per_second": "Windows per second since the last record, validation and saving excluded.",
    "time/data_share": "Share of that time spent waiting for a batch and moving it to the device.",
    "time/forward_share": "Share of that time in model and objective; on a GPU, in queueing them.",
    "time/backward_share": "Share of that time in the backward pass.",
    "time/optimizer_share": "Share of that time in clipping, the optimiser's step and the moving average.",
    "time/diagnostics_share": "Share of that time in diagnostics and in terms computed again (FAMO).",
    "valid/*": "The term (or total) on held-out episodes with the averaged weights (raw ones if EMA is off).",
    "valid/metric/*": "What a term reports besides, on held-out episodes.",
    "valid_raw/*": "The term (or total) on held-out episodes with the raw weights.",
    "valid_raw/metric/*": "What a term reports besides, on held-out episodes with the raw weights.",
    "time/validation_seconds": "Seconds that the validation took.",
    "diag/norm/*/*": "Norm of lambda_i g_i: the weighted gradient of a term in a part, on the sub-batch.",
    "diag/share/*/*": "The term's part of the sum of these norms over the terms, 0 to 1.",
    "diag/cosine/*/*": "Cosine of two terms' gradients (a~b) in a part, over the parameters that both reach.",
    "diag/update_ratio/*": "Norm of a part's change over the norm of the part, over the optimiser's step.",
    "diag/rank/*": "Effective rank exp(-sum p log p), p = singular values / their sum, on the sub-batch.",
    "diag/rank_limit/*": "The largest that this effective rank could be: the lesser of rows and width.",
    "diag/dead/*": "Share of units that stay within 1e-3 of each token's mean over the sub-batch, 0 to 1.",
    "diag/noise_scale": "Gradient noise scale noise_trace / signal in windows, each averaged over the looks.",
    "diag/noise_trace": "Estimate of tr(Sigma), the variance of one window's gradient, of this look alone.",
    "diag/signal": "Estimate of the true gradient's squared norm, of this look alone; may be negative.",
    "diag/spikes": "Steps with a loss spike since the start of the run.",
    "diag/spike/*": "Standard deviations by which the term lay above its mean in this step, a loss spike.",
}
"""Every metric that a run can record, by name; `*` stands for a term (or a term's metric)."""


def describe_metric(name: str) -> str | None:
    """The description of a recorded metric, or None if METRICS has no line for it."""
    if name in METRICS:
        return METRICS[name]
    fitting = [pattern for pattern in METRICS if fnmatchcase(name, pattern)]
    return METRICS[max(fitting, key=len)] if fitting else None


def term_metrics(
    values: Mapping[str, float], lambdas: Mapping[str, float], metrics: Mapping[str, float], total: float
) -> dict[str, float]:
    """What is recorded of a batch: the total, each term raw and weighted, lambdas, the terms' metrics."""
    return (
        {"loss/total": total}
        | {f"loss/{name}/raw": value for name, value in values.items()}
        | {f"loss/{name}/weighted": lambdas[name] * value for name, value in values.items()}
        | {f"lambda/{name}": value for name, value in lambdas.items()}
        | {f"metric/{name}": value for name, value in metrics.items()}
    )
