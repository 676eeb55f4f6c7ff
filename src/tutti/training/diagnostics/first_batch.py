"""The first update: pictures of its batch, shapes of all tensors, parameters that no gradient reaches."""

from __future__ import annotations

import io
import json
import logging
import textwrap
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tutti.nested_dicts import leaves
from tutti.storage.files import write_atomically
from tutti.training.data_feed import Texts
from tutti.training.parallel.ddp import Parallel
from tutti.training.state import TrainState
from tutti.training.update import Observer, Update
from tutti.types import Batch, Features, LossTerms

log = logging.getLogger("tutti.training")

TILE = 128
COLUMNS = 4
WIDEST = 1072
"""Pixels of the report's column: a wider sheet is shown smaller, so its letters are larger."""
LETTERS, LINES = 13, 3
"""Height of the captions' letters, and how many lines a caption may have."""


class FirstBatch(Observer):
    """Shows the first update of a run, once `enabled`: pictures and shapes in the folder `run`, warnings in
    the log. `texts` gives the instructions of a batch.

    Raises: UserError if the disk is full.
    """

    def __init__(self, run: Path, state: TrainState, parallel: Parallel, texts: Texts | None) -> None:
        self.run, self.state, self.parallel, self.texts = run, state, parallel, texts
        self.enabled = False

    def after_forward(self, update: Update, features: Features, terms: LossTerms) -> None:
        if not (self.enabled and self.parallel.world.first and update.step == update.number == 0):
            return
        batch = update.batches[0]
        shown = shapes({"batch": batch, "features": features, "terms": terms})
        write_atomically(self.run / "shapes.txt", shown)
        save_pictures(batch, self.run / "first_batch.png", self.texts(batch) if self.texts else None)

    def before_step(self, update: Update) -> None:
        if update.micro_batches.unknown:
            _warn_of_lone_mean()
        if self.enabled and self.parallel.gives_term_gradients and update.step == 0:
            self._warn_unreached(update.active_terms)

    def _warn_unreached(self, active_terms: Collection[str]) -> None:
        """Warns of what should have a gradient and has none: not of frozen parts, nor of the heads (and the
        decoder) of terms that do not count."""
        out = [name for name in self.state.objective.names if name not in active_terms]
        silent = tuple("model.action." if name == "action" else f"objective.terms.{name}." for name in out)
        learning = {
            name: parameter
            for name, parameter in self.state.parameters.items()
            if parameter.requires_grad and not name.startswith(silent)
        }
        for name, parameter in learning.items():
            if parameter.grad is None:
                log.warning("parameter %s gets no gradient after the first step: no term depends on it", name)
        zero = [n for n, p in learning.items() if p.grad is not None and not bool(p.grad.any())]
        if zero:
            log.warning(
                "%d parameters, such as %s, get a gradient of exactly 0 at first: right behind a layer that "
                "starts at zero, else a sign of dead units",
                len(zero),
                zero[0],
            )


@cache  # once in a process
def _warn_of_lone_mean() -> None:
    log.warning(
        "training.accumulation: a term of your own takes a masked_mean of each micro-batch alone: the lone "
        "row of one counts as much as the many of another. Give masked_mean its mask as a function of the "
        "batch too, `mask_of=` (docs/background/terms.md)"
    )


def save_pictures(batch: Batch, path: Path, texts: list[str] | None = None, most: int = 16) -> None:
    """A PNG grid of the first `most` windows: their views side by side, window number and instruction below.

    The future observation, if the batch has one, follows the views. Absent views stay grey. The instructions
    are also in a JSON file beside it, [window, text], for those whose letters the font does not have.
    """
    count = min(most, len(batch.window))
    shown = [_views(batch, row) for row in range(count)]
    width = max(len(views) for views in shown) * TILE + 8
    columns = max(1, min(COLUMNS, count, WIDEST // width))
    size = LETTERS * max(WIDEST, columns * width) // WIDEST
    height = TILE + (LINES + 1) * size
    sheet = Image.new("RGB", (columns * width, -(-count // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    font: Any = ImageFont.load_default(size)
    told: list[tuple[int, str]] = []
    for row, views in enumerate(shown):
        left, top = (row % columns) * width, (row // columns) * height
        for number, view in enumerate(views):
            sheet.paste(view, (left + number * TILE, top))
        text = texts[row] if texts is not None else f"instruction {int(batch.instruction_id[row])}"
        told.append((int(batch.window[row]), text))
        caption = text if _can_draw(text, font) else f"text in {path.with_suffix('.json').name}"
        lines = textwrap.wrap(
            f"{told[-1][0]}: {caption}", max(8, 2 * width // size), max_lines=LINES, placeholder=" …"
        )
        draw.multiline_text((left + 2, top + TILE), "\n".join(lines), fill="black", spacing=0, font=font)
    png = io.BytesIO()
    sheet.save(png, format="PNG")
    write_atomically(path, png.getvalue())
    lines = ",\n".join(json.dumps(one, ensure_ascii=False) for one in told)
    write_atomically(path.with_suffix(".json"), f"[\n{lines}\n]\n")


def _can_draw(text: str, font: Any) -> bool:
    """False if a letter would come out as the box that stands for an unknown one."""
    box = bytes(font.getmask(chr(0x10FFFF)))
    return all(letter.isspace() or bytes(font.getmask(letter)) != box for letter in set(text))


def _views(batch: Batch, row: int) -> list[Image.Image]:
    """The pictures of one window, each TILE pixels wide and high."""
    views: list[Image.Image] = []
    for observation in (batch.observation, *(future.observation for future in batch.futures.values())):
        pictures = observation.images[row].cpu()
        if pictures.dtype != torch.uint8:  # in [-1, 1]
            pictures = ((pictures.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
        for picture, present in zip(pictures, observation.image_mask[row].tolist(), strict=True):
            pixels = numpy.ascontiguousarray(picture.permute(1, 2, 0).numpy())
            image = Image.fromarray(pixels) if present else Image.new("RGB", (8, 8), "grey")
            views.append(image.resize((TILE, TILE), Image.Resampling.NEAREST))
    return views


def shapes(values: Mapping[str, Any]) -> str:
    """One line a tensor, "name: dtype (shape)"; of what is no tensor, its value."""
    lines: list[str] = []
    for name, value in leaves(values):
        if isinstance(value, Tensor):
            kind, sizes = str(value.dtype).removeprefix("torch."), ", ".join(map(str, value.shape))
            lines.append(f"{name}: {kind} ({sizes})\n")
        else:
            lines.append(f"{name}: {value}\n")
    return "".join(lines)
