"""What `tutti doctor` says of pre-trained towers: what was loaded, what they read, what learns how fast."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tutti.findings import HARMFUL_RATE, UNKNOWN_WORDS, Finding
from tutti.models.config import pretrained_parts
from tutti.models.decoders.pi0 import Pi0Decoder
from tutti.models.pretrained.vision import PretrainedVision
from tutti.models.pretrained.vlm import VlmFusion
from tutti.models.pretrained.vlm_vision import VlmVision
from tutti.report.formatting import percent
from tutti.runs.build import BuiltTraining
from tutti.training.optim.learning_rates import part_of
from tutti.types import Batch, effective_rank

RANKED, COLLAPSED = 512, 2.0
"""So many tokens are looked at; below this effective rank about their mean they are nearly alike."""


def check_towers(training: BuiltTraining, batch: Batch) -> tuple[list[str], list[Finding]]:
    """Lines about each tower, the parameters of each part among them, and what is wrong with them."""
    lines: list[str] = []
    findings: list[Finding] = []
    for socket, part in pretrained_parts(training.model).items():
        tower = part.tower
        kind = f"{tower.values['model_type']} with random weights, from scratch"
        lines.append(f"{socket}: {tower.begun or tower.loaded or kind}.")
        says = {"vision": _pictures, "language": _texts, "action": _expert}.get(socket, _sequence)
        told, found = says(training, batch)
        lines.append(f"{socket}: {told}")
        findings += [*found, *_rate(training, socket)]
    if not lines:
        return [], []
    counts: dict[str, list[int]] = {}
    for name, parameter in training.model.named_parameters():
        all_, learning = counts.setdefault(part_of(f"model.{name}"), [0, 0])
        counts[part_of(f"model.{name}")] = [
            all_ + parameter.numel(),
            learning + parameter.numel() * (f"model.{name}" in training.trainer.parameters),
        ]
    each = [f"{part} {learning:,} of {all_:,}" for part, (all_, learning) in counts.items()]
    return [*lines, f"Learning parameters: {', '.join(each)}."], findings


@torch.no_grad()
def _pictures(training: BuiltTraining, batch: Batch) -> tuple[str, list[Finding]]:
    vision, spec, seen = training.model.vision, training.model.spec, batch.observation
    assert isinstance(vision, PretrainedVision | VlmVision)
    tokens = vision(training.model.prepare(seen.images), seen.image_mask)
    found, rows = tokens.values.shape[1], tokens.values[tokens.mask][:RANKED].float()
    rank = float(effective_rank(rows - rows.mean(dim=0))) if len(rows) > 1 else 0.0
    expected = len(spec.views) * vision.tokens_per_view
    mean, std = vision.tower.config.colours()  # pyright: ignore[reportAttributeAccessIssue]
    shown = ", ".join(f"{m:.3g} +- {s:.3g}" for m, s in zip(mean, std, strict=True))
    values = vision.tower.values
    own = values.get("vision_config", values).get("image_size", "any size")
    line = (
        f"{found} picture tokens found, {len(spec.views)} views x {vision.tokens_per_view}; pictures of "
        f"{spec.image_size} px (the tower's: {own}), colours {shown}; "
        f"effective rank of {len(rows)} tokens {rank:.3g} of {min(rows.shape)}."
    )
    findings: list[Finding] = []
    if found != expected:
        sentence = f"{found} picture tokens reach the fusion; expected {expected}."
        findings.append(Finding(kind="picture_tokens", severity="fault", sentence=sentence, part="vision"))
    if rank < COLLAPSED < min(rows.shape):
        said = f"The vision tower's tokens of the first batch are nearly alike: effective rank {rank:.3g}."
        cure = "Are all pictures the same, or mean and std of model.vision not those of its training?"
        findings.append(
            Finding(
                kind="collapsed_tokens",
                severity="warning",
                sentence=said,
                number=rank,
                cure=cure,
                part="vision",
            )
        )
    return line, findings


def _sequence(training: BuiltTraining, batch: Batch) -> tuple[str, list[Finding]]:
    """The tokens that the decoder of a VLM reads."""
    model, fusion = training.model, training.model.fusion
    assert isinstance(fusion, VlmFusion)
    pictures = len(model.spec.history or (0,)) * len(model.spec.views) * model.vision.tokens_per_view
    sees = "causally" if fusion.causal else "both ways"
    return (
        f"{fusion.depth} blocks of width {fusion.width} over {pictures} picture tokens, up to "
        f"{batch.observation.text.shape[1]} of text, which see each other {sees}, state and readout."
    ), []


def _expert(training: BuiltTraining, _: Batch) -> tuple[str, list[Finding]]:
    """The expert that shares keys and values with a VLM."""
    action, spec = training.model.action, training.model.spec
    assert isinstance(action, Pi0Decoder)
    states, actions = action.sizes
    return (
        f"an expert of {action.depth} blocks of width {action.width} shares keys and values with the VLM's; "
        f"{spec.state_dim} of {states} dimensions of a state and {spec.action_dim} of {actions} of an action "
        "are in use."
    ), []


def _texts(training: BuiltTraining, _: Batch) -> tuple[str, list[Finding]]:
    tokenizer, texts = training.data.tokenizer, training.data.windows.instructions
    longest = max(map(tokenizer.length, texts), default=0)
    unknown = tokenizer.unknown_share(texts)
    line = (
        f"the longest instruction has {longest} tokens, {tokenizer.max_length} are read; "
        f"{percent(unknown, 1)} of all stand for what its tokenizer does not know."
    )
    findings: list[Finding] = []
    if unknown > UNKNOWN_WORDS:
        said = f"The tower's tokenizer does not know {percent(unknown, 1)} of the instructions' tokens."
        cure = "Is it of another language, or does tokenizer.json belong to another tower?"
        findings.append(
            Finding(kind="unknown_words", severity="warning", sentence=said, number=unknown, cure=cure)
        )
    if longest > tokenizer.max_length:
        said = f"An instruction has {longest} tokens, the text tower reads {tokenizer.max_length}."
        cure = "Raise data.text_length, shorten the texts, or take a tower that reads more."
        findings.append(
            Finding(kind="instruction_cut", severity="warning", sentence=said, number=longest, cure=cure)
        )
    return line, findings


def _rate(training: BuiltTraining, socket: str) -> Sequence[Finding]:
    """A tower whose own weights learn as fast as a fresh decoder beside it, from the first update on."""
    tower, config = pretrained_parts(training.model)[socket].tower, training.config
    factor = config.training.optimizer.learning_rates.get(socket, 1.0)
    phases = training.trainer.strategy.phases
    first = phases[0].learning_rates.get(socket, 1.0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    decoder = training.model.action
    fresh = not (isinstance(decoder, Pi0Decoder) and (decoder.tower.loaded or decoder.tower.begun))
    learns = tower.config.learn == "all" and (tower.loaded or tower.begun)
    if not (fresh and learns) or factor * first <= HARMFUL_RATE:
        return []
    said = (
        f"{socket} is pre-trained and learns at {factor * first:g} of the learning rate from the first "
        "update on, beside parts that are new."
    )
    cure = (
        f"Set training.optimizer.learning_rates={{{socket}: 0.1}}, strategy.kind=warmup_then_joint, or "
        f"{tower.config.key}.learn to none or {{lora: 16}}."
    )
    return [
        Finding(
            kind="tower_rate", severity="hint", sentence=said, number=factor * first, cure=cure, part=socket
        )
    ]
