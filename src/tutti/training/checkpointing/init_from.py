"""Starts a training from the weights of another run or of an exported policy, as far as they fit."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tutti.data.tokenize import Tokenizer
from tutti.distributed.world import world
from tutti.models.config import pretrained_parts
from tutti.models.interfaces import ActionDecoder
from tutti.models.vla import VLA
from tutti.nested_dicts import changed_keys, indented
from tutti.storage.checkpoint import find_checkpoint, listed, step_of
from tutti.storage.files import write_json
from tutti.storage.manifest import CONFIG, SPEC, TOKENIZER
from tutti.storage.reading import parse_json, parse_yaml, read_json
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
        listing = (self.manifest.folder / self.manifest.name).read_bytes()
        self.sha256 = require_hash(config, self.manifest.folder, hashlib.sha256(listing).hexdigest())
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
        if isinstance(module, VLA):
            self._require_towers(module, theirs)
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
            about = {"step": step, "weights": self.weights, "sha256": self.sha256}
            write_report(run, config, about, self.found)

    def _require_towers(self, model: VLA, theirs: dict[str, Tensor]) -> None:
        """A frozen tower is that of its own folder: the other run's tensors are dropped if they are the same.

        Raises: UserError if they have learned, so that they would be lost; or if it has none of them, since
            they stayed in the folder of a tower, and that was another one than here.
        """
        folder, half = self.manifest.folder, self.manifest.table.get("stored") == "float16"
        for socket, part in pretrained_parts(model).items():
            start, config, loaded = f"{socket}.tower.", part.tower.config, part.tower.loaded
            frozen = {f"{start}{n}": t.half() if half else t for n, t in part.tower.outside().items()}
            learned = any(n.startswith(start) and not n.endswith((".down", ".up")) for n in theirs)
            now = {"sha256": loaded.sha256, "architecture": config.values()} if loaded and not learned else {}
            there = parse_yaml(self.manifest.text(CONFIG), folder / CONFIG)["model"].get(config.socket)
            was = {key: (there or {}).get(key, one) for key, one in now.items()}
            if lines := changed_keys(was, now, config.key):
                raise UserError(
                    f"training.init_from: {folder} has learned beside another tower (there -> here):\n"
                    f"{indented(lines)}\n  cure: {config.key}.path of that one, or an export, which holds it"
                )
            own = frozen.keys() | {f"{start}{name}" for name in part.tower.state_dict()}
            both = frozen.keys() & theirs.keys()
            lost = [name for name in both if not theirs[name].to(frozen[name]).equal(frozen[name])]
            lost += [
                n for n in theirs if n.startswith(start) and n.endswith((".down", ".up")) and n not in own
            ]
            if lost:
                raise UserError(
                    f"training.init_from: the tower in {socket} of {self.manifest.folder} has learned, and "
                    f"here it would begin as that of {config.path}.\n  expected: {config.key}.learn as it "
                    f"was there\n  found: {len(lost)} tensors that would be lost, such as {sorted(lost)[0]}"
                    f"\n  cure: an export (tutti export merges LoRA) with {config.key}.learn=all, or with "
                    f"{config.key}.weights=random, which may stay frozen"
                )
            for name in both:
                self.found[TAKEN][f"model.{name}"] = ""
                theirs.pop(name)

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


def table_of(found: Mapping[str, Mapping[str, str]]) -> str:
    """A line for each kind that there is."""
    lines = (f"  {kind:<20}{len(n):>5}  {_examples(n)}".rstrip() for kind, n in found.items() if n)
    return "\n".join(lines)


def require_hash(config: InitFromConfig, folder: Path, found: str) -> str:
    """The SHA-256 of the weights. Raises: UserError if the config asks for another."""
    if config.sha256 not in ("auto", found):
        raise UserError(
            f"training.init_from: the weights of {folder} have SHA-256 {found}.\n  expected: {config.sha256},"
            " as training.init_from.sha256 says\n  cure: put those weights back, or set it to auto"
        )
    return found


def with_hash(config: InitFromConfig | Literal["off"], run: Path) -> InitFromConfig | Literal["off"]:
    """The same with the SHA-256 of the weights it has begun with, which the report in the folder of the run
    has, as a checkpoint holds it. All ranks must call it."""
    if config == "off":
        return config

    def noted() -> str:
        path = run / REPORT
        found = read_json(path).get("sha256", "auto") if path.is_file() else "auto"
        return found if isinstance(found, str) else "auto"

    return config.model_copy(update={"sha256": world().on_rank_zero(noted)})


def write_report(
    run: Path, config: InitFromConfig, about: Mapping[str, Any], found: Mapping[str, Mapping[str, str]]
) -> None:
    """What was taken, into the folder of the new run."""
    about = {"init_from": config.model_dump(mode="json"), **about}
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
