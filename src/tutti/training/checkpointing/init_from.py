"""Starts a training from the weights of another run or of an exported policy, as far as they fit."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutti.data.tokenize import Tokenizer
from tutti.distributed.world import world
from tutti.models.config import pretrained_parts
from tutti.models.interfaces import ActionDecoder
from tutti.models.pretrained.config import TowerConfig
from tutti.models.pretrained.facts import known_kinds
from tutti.models.pretrained.tower import Tower
from tutti.models.vla import VLA
from tutti.storage.checkpoint import find_checkpoint, listed, step_of
from tutti.storage.files import write_json
from tutti.storage.manifest import SPEC, TOKENIZER
from tutti.storage.reading import parse_json, read_json
from tutti.storage.tensors import check_finite, read, weights_in
from tutti.training.checkpointing.config import InitFromConfig
from tutti.types import UserError

log = logging.getLogger("tutti.training")

REPORT = "init_from.json"
"""What a run has taken from the other one."""
TAKEN, IN_PART, BY_DATA = "taken", "taken in part", "of this run's data"
OTHER_SHAPE, ONLY_HERE, ONLY_THERE = "another shape", "only here", "only there"
KINDS = (TAKEN, IN_PART, OTHER_SHAPE, BY_DATA, ONLY_HERE, ONLY_THERE)
EXAMPLES = 3

ROWS = (
    (r"model\.language\.token\.weight", 0, "tokens"),
    (r"model\.language\.position", 0, "places"),
    (r"model\.vision\.position|objective\.terms\.[^.]+\.(target\.)?position", 0, "views"),
    (r"model\.fusion\.state\.weight", 1, "state names"),
)
"""Tensors that have a row (axis 1: a column) for each token, place in the text, view or state dimension: it
belongs to that name, not to its number."""
NUMBERED = re.compile(r"\[\d+\]$")
Labels = Mapping[str, Sequence[Any]]


class InitialWeights:
    """The weights of another run, filled into the modules of a new one before anything is sharded.

    A tensor is taken where name and shape fit. Of the tensors of `ROWS` each row is that of the same name;
    rows of names that the other run does not know stay new. What an action decoder fits to the data
    (bounds, bin edges, a vocabulary) and the state of the balancing are those of this run.
    """

    def __init__(
        self, config: InitFromConfig, source: Path, spec: Mapping[str, Any], tokenizer: Tokenizer
    ) -> None:
        """`source` is what `source_of` gives; `spec` and `tokenizer` are those of the new training.

        Raises: UserError if the weights are damaged, or what lies beside them cannot be read.
        """
        self.config, self.manifest = config, listed(source)
        self.weights = weights_in(self.manifest, config.weights)[0]
        self.found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}
        folder, text = self.manifest.folder, self.manifest.text
        try:
            other = Tokenizer.from_json(text(TOKENIZER))
        except UserError as error:
            raise UserError(f"{folder / TOKENIZER}: {error}") from error
        self.here = _labels(spec, tokenizer)
        self.there = _labels(parse_json(text(SPEC), folder / SPEC), other)

    def fill(self, part: str, module: nn.Module) -> None:
        """Copies what fits into `module`: the "model", or the "objective".

        Raises: UserError if the weights are damaged or not finite.
        """
        file = part if self.weights == "raw" else "ema" if part == "model" else f"{part}_ema"
        theirs = {n.removeprefix(f"{file}/"): t for n, t in read(self.manifest, f"{file}/").items()}
        own, copied = set(_fitted(module)), dict[str, Tensor]()
        for name, value in module.state_dict().items():
            key = f"{part}.{name}"
            if name in own or key.startswith("objective.balancing."):
                self.found[BY_DATA][key] = ""
                theirs.pop(name, None)
            elif name in theirs:
                kind, why = self._copy(key, value, theirs.pop(name))
                self.found[kind][key] = why
                copied |= {name: value} if kind in (TAKEN, IN_PART) else {}
            else:
                self.found[ONLY_HERE][key] = ""
        check_finite(self.manifest.folder, copied)  # as they are in this model's own type of numbers
        self.found[ONLY_THERE] |= {f"{part}.{name}": "" for name in theirs}

    def report(self, run: Path) -> None:
        """Logs what was taken, and writes it into the folder of the new run.

        Raises: UserError if nothing fits.
        """
        folder, config = self.manifest.folder, self.config
        if not self.found[TAKEN] and not self.found[IN_PART]:
            raise UserError(
                f"training.init_from: no tensor of {folder} fits this model: expected the same names and "
                f"shapes, found {_examples(self.found[OTHER_SHAPE] | self.found[ONLY_THERE])}. Use its model "
                "section, or set training.init_from=off."
            )
        log.info("tensors of %s (%s) as the start:\n%s", folder, self.weights, table_of(self.found))
        if world().first:
            step = step_of(folder) if folder != Path(config.run) else None
            about = {"init_from": config.model_dump(mode="json"), "step": step, "weights": self.weights}
            write_report(run, about, self.found)

    @torch.no_grad()
    def _copy(self, key: str, mine: Tensor, value: Tensor) -> tuple[str, str]:
        """What of `value` has become that of `mine`."""
        sizes = f"{list(mine.shape)} here, {list(value.shape)} there"
        for pattern, axis, labels in ROWS:
            if not re.fullmatch(pattern, key):
                continue
            here, there = self.here[labels], self.there[labels]
            lengths = [len(here), len(there)] == [mine.shape[axis], value.shape[axis]]
            rest = [t.transpose(0, axis).shape[1:] for t in (mine, value)]
            known = {name: place for place, name in enumerate(there)}
            both = [(row, known[name]) for row, name in enumerate(here) if name in known]
            if here != there and lengths and rest[0] == rest[1] and both:
                rows, theirs = torch.tensor(both).T
                mine.index_copy_(axis, rows, value.index_select(axis, theirs).to(mine.dtype))
                return IN_PART, f"{len(both)} of {len(here)} {labels}"
        if mine.shape != value.shape or mine.is_floating_point() != value.is_floating_point():
            return OTHER_SHAPE, sizes
        mine.copy_(value)
        return TAKEN, ""


class TowerWeights:
    """The tensors of a tower's folder, filled into the pre-trained parts of a new model as far as they fit:
    a tower of other sizes, fewer blocks or another picture size. What does not is listed."""

    def __init__(self, config: InitFromConfig) -> None:
        self.config, self.folder = config, Path(config.run)
        self.found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}

    @torch.no_grad()
    def fill(self, model: VLA, run: Path) -> None:
        """Copies what fits, logs it, and writes it into the folder of the run.

        Raises: UserError if nothing does, or the folder is not a tower that can be loaded.
        """
        theirs: dict[str, Tensor] = {}
        for socket, part in pretrained_parts(model).items():
            own = part.tower.config
            kind = read_json(self.folder / "config.json").get("model_type")
            if not isinstance(own, TowerConfig) or (kind, own.socket) not in known_kinds():
                continue
            update = {"path": self.folder, "weights": "pretrained", "learn": "all", "layer": -1}
            tower = Tower(own.model_copy(update=update | {"architecture": "auto", "sha256": "auto"}))
            tower.load({})
            theirs |= {f"{socket}.tower.{name}": tensor for name, tensor in tower.state_dict().items()}
        for key, mine in model.state_dict().items():
            value = theirs.pop(key, None)
            if value is None:
                self.found[ONLY_HERE][f"model.{key}"] = ""
                continue
            fits = value.shape == mine.shape
            why = "" if fits else f"{list(mine.shape)} here, {list(value.shape)} there"
            self.found[TAKEN if fits else OTHER_SHAPE][f"model.{key}"] = why
            if fits:
                mine.copy_(value)
        self.found[ONLY_THERE] = {f"model.{name}": "" for name in theirs}
        if not self.found[TAKEN]:
            raise UserError(
                f"training.init_from: no tensor of the tower {self.folder} fits this model.\n  expected: "
                "model.vision or model.language with kind: pretrained, weights: random and a tower of that "
                f"kind\n  found: {_examples(self.found[OTHER_SHAPE]) or 'none of its kind'}"
            )
        log.info("tensors of %s as the start:\n%s", self.folder, table_of(self.found))
        if world().first:
            write_report(run, {"init_from": self.config.model_dump(mode="json"), "step": None}, self.found)


def table_of(found: Mapping[str, Mapping[str, str]]) -> str:
    """A line for each kind that there is."""
    lines = (f"  {kind:<20}{len(n):>5}  {_examples(n)}".rstrip() for kind, n in found.items() if n)
    return "\n".join(lines)


def write_report(run: Path, about: Mapping[str, Any], found: Mapping[str, Mapping[str, str]]) -> None:
    """What was taken, into the folder of the new run."""
    counts = {kind: len(names) for kind, names in found.items()}
    shown = {kind: names if any(names.values()) else [*names] for kind, names in found.items()}
    write_json(run / REPORT, {**about, "counts": counts, **shown})


def source_of(config: InitFromConfig, *begun: Path) -> Path:
    """The folder of the weights. All ranks must call it, and get the same.

    A training that has begun before keeps to the checkpoint that it found, by the report in its folder, the
    first of `begun` that has one. Raises: UserError if there is no such checkpoint.
    """

    def find() -> Path:
        path = next((run / REPORT for run in begun if (run / REPORT).is_file()), None)
        noted = {} if path is None else read_json(path, cure="Delete it: `tutti train` writes it.")
        again = noted.get("init_from") == config.model_dump(mode="json") and type(noted.get("step")) is int
        return find_checkpoint(Path(config.run), noted["step"] if again else config.checkpoint)

    try:
        return world().on_rank_zero(find)
    except UserError as error:
        raise UserError(f"training.init_from: {error}") from error


def _fitted(module: nn.Module) -> list[str]:
    """The buffers that an action decoder gets from the data."""
    decoder = getattr(module, "action", None)
    if not isinstance(decoder, ActionDecoder) or not decoder.needs_fit:
        return []
    return [f"action.{name}" for name, _ in decoder.named_buffers()]


def _labels(spec: Mapping[str, Any], tokenizer: Tokenizer) -> Labels:
    """The names of rows. Numbered ones, "state[0]", say nothing of what a number is."""
    given = (spec.get(key) for key in ("views", "state_names"))
    views, states = (tuple(map(str, one)) if isinstance(one, list | tuple) else () for one in given)
    named = () if any(NUMBERED.search(name) for name in states) else states
    return {
        "tokens": tokenizer.tokens,
        "places": range(tokenizer.text_length),
        "views": views,
        "state names": named,
    }


def _examples(names: Mapping[str, str]) -> str:
    shown = [f"{name} ({why})" if why else name for name, why in [*names.items()][:EXAMPLES]]
    return ", ".join([*shown, "..."] if len(names) > EXAMPLES else shown)
