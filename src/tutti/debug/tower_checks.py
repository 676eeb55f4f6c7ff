"""What `tutti doctor` says of pre-trained towers: what was loaded, what they read, what learns how fast."""

from __future__ import annotations

from dataclasses import replace

import torch

from tutti.findings import HARMFUL_RATE, UNKNOWN_WORDS, Finding
from tutti.models.config import pretrained_parts
from tutti.models.decoders.pi0 import Pi0Decoder
from tutti.models.pretrained.vision import PretrainedVision
from tutti.models.pretrained.vlm import VlmFusion, VlmLanguage
from tutti.models.pretrained.vlm_vision import VlmVision
from tutti.objectives.terms.alignment import EmbeddingTerm
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
    keys: set[str] = set()
    for socket, part in pretrained_parts(training.model).items():
        tower, expert = part.tower, isinstance(part, Pi0Decoder)
        kind = "a new expert" if expert else tower.values["model_type"]
        told = tower.begun or tower.loaded
        if told and tower.config.key in keys:  # what is not read has been said of the network's first part
            told = replace(told, unread=())
        keys.add(tower.config.key)
        lines.append(f"{socket}: {told or f'{kind} with random weights, from scratch'}.")
        says = {"vision": _pictures, "language": _texts, "action": _expert}.get(socket, _sequence)
        line, found = says(training, batch)
        lines.append(f"{socket}: {line}")
        findings += found
    if not lines:
        return [], []
    findings += [*_rates(training), *_alignment(training)]
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


def _alignment(training: BuiltTraining) -> list[Finding]:
    """Terms that compare pictures with what a VLM has before its first block: the embeddings of the words."""
    terms = [name for name, one in training.objective.terms.items() if isinstance(one, EmbeddingTerm)]
    if not isinstance(training.model.language, VlmLanguage):
        return []
    said = (
        "compares pictures with the VLM's word embeddings, a bag of words which none of its blocks has read."
    )
    cure = "To teach what a text means take recoverable_language or next_token; off: objective.{}=null."
    return [
        Finding(
            kind="bag_of_words", severity="hint", sentence=f"{name} {said}", cure=cure.format(name), term=name
        )
        for name in terms
    ]


def _rates(training: BuiltTraining) -> list[Finding]:
    """Towers whose own weights learn as fast as a fresh decoder beside them, from the first update on; one
    finding for the parts of a VLM that have one rate."""
    decoder, phase = training.model.action, training.trainer.strategy.phases[0]
    if isinstance(decoder, Pi0Decoder) and (decoder.tower.loaded or decoder.tower.begun):
        return []
    groups: dict[tuple[str, float], list[str]] = {}
    for socket, part in pretrained_parts(training.model).items():
        tower = part.tower
        rate = training.config.training.optimizer.learning_rates.get(socket, 1.0)
        rate *= phase.learning_rates.get(socket, 1.0)  # pyright: ignore[reportCallIssue, reportArgumentType]
        if tower.config.learn == "all" and (tower.loaded or tower.begun) and rate > HARMFUL_RATE:
            groups.setdefault((tower.config.key, rate), []).append(socket)
    found: list[Finding] = []
    for (key, rate), parts in groups.items():
        are = "is" if len(parts) == 1 else "are"
        much = "the full" if rate == 1 else f"{rate:g} of the"
        said = (
            f"{', '.join(parts)} {are} pre-trained, with {much} learning rate from the first update on, "
            "beside parts that are new."
        )
        slower = ", ".join(f"{part}: 0.1" for part in parts)
        cure = (
            f"Set training.optimizer.learning_rates={{{slower}}}, strategy={{kind: warmup_then_joint, parts: "
            f"[{', '.join(parts)}]}}, or {key}.learn to none or {{lora: 16}}."
        )
        given = {"kind": "tower_rate", "severity": "hint", "sentence": said, "number": rate, "cure": cure}
        found.append(Finding(**given, part=parts[0]))
    return found
