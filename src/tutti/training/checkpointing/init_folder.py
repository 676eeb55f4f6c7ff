"""Starts a training from a folder that others have saved: a tower, a vision-language model, a pi0."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutti.data.tokenize import Tokenizer
from tutti.distributed.world import world
from tutti.models.config import WithTower, pretrained_parts
from tutti.models.pretrained.config import CONFIG_FILE, FolderConfig, TextsConfig, TowerConfig, weights_hash
from tutti.models.pretrained.facts import known_kinds, of_pi0
from tutti.models.pretrained.hub import HUB, hub_folder
from tutti.models.pretrained.networks import built, persistent
from tutti.models.pretrained.tower import Loaded, read_folder, unread_of
from tutti.models.vla import VLA
from tutti.storage.manifest import TOKENIZER
from tutti.storage.reading import read_json, shown
from tutti.storage.tensors import check_finite
from tutti.training.checkpointing.config import InitFromConfig
from tutti.training.checkpointing.init_from import (
    IN_PART,
    KINDS,
    ONLY_HERE,
    ONLY_THERE,
    OTHER_SHAPE,
    TAKEN,
    require_hash,
    table_of,
    write_report,
)
from tutti.types import UserError

log = logging.getLogger("tutti.training")

EXPERT = "action"
"""The part that a folder has only where it is in pi0's format."""
PATTERNS = 6
WORDS = re.compile(r"\b(embed_tokens|word_embeddings|token_embedding|shared|lm_head)\.weight$")
"""What has a row for each token. Folders of one tokenizer differ: 257,216 in PaliGemma, 257,152 in pi0."""


class FolderWeights:
    """The tensors of such a folder, filled into the pre-trained parts of a new model before it is sharded.

    A tower goes into `model.vision` or `model.language` of its kind; a VLM into the three parts of
    `model.vlm`; a checkpoint in pi0's format besides into the expert of `model.action.kind: pi0`. Every
    tensor of those parts must be in the folder in the same shape, and every tensor of the folder in them, but
    for those that the config allows to differ, those that no token depends on, and those that `layer` or
    `layers` cut off. Of a word embedding the rows that both have are taken. The other parts stay new.
    """

    def __init__(self, config: InitFromConfig) -> None:
        self.config, name = config, config.run
        hub = name.startswith(HUB)
        self.folder = hub_folder(name.removeprefix(HUB), "training.init_from") if hub else Path(name)
        self.found: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}

    @torch.no_grad()
    def fill(self, model: VLA, run: Path) -> None:
        """Copies what fits, logs it, and writes it into the folder of the run.

        Raises: UserError if something differs that the config does not allow, nothing fits, or the folder is
            not one that can be loaded.
        """
        sha256 = ""
        for source, parts in self._sources(model):
            sha256 = require_hash(self.config, source.folder, weights_hash(source))
            self._fill(source, parts, sha256)
        known = {f"model.{name}" for name in model.state_dict()}
        placed = {name for names in self.found.values() for name in names}
        fresh = {name: "" for name in known - placed}
        self.found[ONLY_HERE] |= {name: fresh[name] for name in sorted(fresh)}
        log.info("tensors of %s as the start:\n%s", self.config.run, table_of(self.found))
        if world().first:
            write_report(run, self.config, {"step": None, "sha256": sha256}, self.found)

    def _sources(self, model: VLA) -> list[tuple[FolderConfig, dict[str, WithTower]]]:
        """The folder as the model's own towers would be described by it, with the parts that it fills.

        Raises: UserError if it is of no kind that the model has, or one of them cannot take it.
        """
        given: dict[str, tuple[FolderConfig, dict[str, WithTower]]] = {}
        here: list[str] = []
        for name, part in pretrained_parts(model).items():
            own = part.tower.config
            update: dict[str, Any] = {"path": Path(self.config.run), "weights": "pretrained", "learn": "all"}
            update |= {"architecture": "auto", "sha256": "auto"}
            update |= {"layer": -1} if isinstance(own, TowerConfig) else {}
            source = own.model_copy(update=update)
            found = read_json(self.folder / CONFIG_FILE)
            kind, new = found.get("model_type"), part.tower.values["model_type"]
            here.append(f"{own.key} ({new})")
            served = (kind, own.socket) in known_kinds() or (
                own.socket == "vlm" and of_pi0(found) is not None
            )
            if not served or source.values()["model_type"] != new:
                continue
            if own.weights == "pretrained" and own.learn != "all":
                raise UserError(
                    f"training.init_from is {self.config.run}, but {own.key} has weights: pretrained and "
                    f"does not learn itself, so it is always that of {own.path}.\n  expected: weights: "
                    f"random, or learn: all\n  cure: {own.key}.path={self.config.run} without "
                    f"training.init_from, or {own.key}.weights=random"
                )
            self._require_same_words(own)
            if name != EXPERT or "action_expert" in source.values():
                given.setdefault(own.key, (source, {}))[1][name] = part
        if not given:
            said = read_json(self.folder / CONFIG_FILE)
            kind = shown(said.get("model_type", said.get("type")))
            raise UserError(
                f"training.init_from: no pre-trained part of this model can begin as {self.config.run}.\n  "
                f"expected: model.vision, model.language or model.vlm of the kind in its {CONFIG_FILE}, with "
                f"weights: random\n  found: {kind} there; {', '.join(dict.fromkeys(here)) or 'none'} here\n  "
                "cure: name the folder of such a tower"
            )
        return [*given.values()]

    def _require_same_words(self, own: FolderConfig) -> None:
        """Raises: UserError if both folders have a tokenizer, and a token's row would be that of another."""
        files = [folder / TOKENIZER for folder in (own.folder, self.folder)]
        if not isinstance(own, TextsConfig) or not all(file.is_file() for file in files):
            return
        if files[0].read_bytes() == files[1].read_bytes():
            return
        here, there = (Tokenizer.from_folder(file.parent, []).tokens for file in files)
        if here != there:
            both = zip_longest(here, there)
            row, (mine, theirs) = next((n, two) for n, two in enumerate(both) if two[0] != two[1])
            raise UserError(
                f"training.init_from: {files[1]} is not the tokenizer of {own.key}.\n  expected: the tokens "
                f"of {files[0]}\n  found: token {row} is {theirs!r} there, {mine!r} here\n  cure: copy it "
                f"beside the config.json that {own.key}.path names"
            )

    def _fill(self, source: FolderConfig, parts: Mapping[str, WithTower], sha256: str) -> None:
        """Of one network, whose tensors the parts share out among them."""
        there, others = read_folder(source)
        theirs, wrong = dict(there), {kind: dict[str, str]() for kind in (OTHER_SHAPE, ONLY_HERE, ONLY_THERE)}
        with torch.device("meta"):  # also what `layer` or `layers` has cut off
            whole = built(next(iter(parts.values())).tower.config)
        here = {name for name, _ in persistent(whole)}
        begun: dict[str, Loaded] = {}
        copied: dict[str, Tensor] = {}
        for name, part in parts.items():
            own, lacking = part.tower.own(), 0
            for tensor, mine in own.items():
                key, value = f"model.{name}.tower.network.{tensor}", theirs.pop(tensor, None)
                if value is not None and value.shape == mine.shape:
                    self.found[TAKEN][key] = ""
                    copied[key] = mine.copy_(value)
                    continue
                if value is not None and WORDS.search(tensor) and value.shape[1:] == mine.shape[1:]:
                    both, copied[key] = min(len(mine), len(value)), mine
                    mine[:both] = value[:both]
                    self.found[IN_PART][key] = f"{both:,} of {len(mine):,} rows, {len(value):,} there"
                    continue
                lacking += 1
                if value is None:
                    wrong[ONLY_HERE][key] = ""
                else:
                    wrong[OTHER_SHAPE][key] = f"{[*mine.shape]} here, {[*value.shape]} there"
            given = {"kind": part.tower.values["model_type"], "path": source.path, "sha256": sha256}
            begun[name] = Loaded(**given, tensors=len(own) - lacking, unread=(), lacking=lacking)
        known = (*source.facts().others, *unread_of(source))
        left = [name for name in theirs if not name.startswith(known or ("\0",))]
        key = f"{source.key}.network."
        wrong[ONLY_THERE] = {f"{key}{name}": "" for name in left if name not in here}
        self._require_allowed(source, wrong)
        check_finite(source.folder, copied)
        if not copied:
            raise UserError(
                f"training.init_from: no tensor of {source.path} has the shape of {source.key}'s."
            )
        for kind, names in wrong.items():
            self.found[kind] |= names
        rest = {*others, *(name for name in theirs if f"{key}{name}" not in wrong[ONLY_THERE])}
        self.found[ONLY_THERE] |= {f"{key}{name}": "" for name in sorted(rest)}
        for name, part in parts.items():
            part.tower.begun = replace(begun[name], unread=tuple(sorted({*others, *theirs})))

    def _require_allowed(self, source: FolderConfig, wrong: Mapping[str, Mapping[str, str]]) -> None:
        """Raises: UserError if something differs that the config does not name."""
        refused = {
            kind: {
                n: why for n, why in names.items() if not any(fnmatchcase(n, p) for p in self.config.allow)
            }
            for kind, names in wrong.items()
        }
        names = [name for one in refused.values() for name in one]
        if not names:
            return
        # "a.layers.3.b" is one of "a.layers.3.*": what a user would allow.
        patterns = dict.fromkeys(re.sub(r"^(.*\.\d+\.).*$", r"\1*", name) for name in names)
        listed = ", ".join([*patterns][:PATTERNS]) + (", ..." if len(patterns) > PATTERNS else "")
        raise UserError(
            f"training.init_from: {len(names)} tensors of {source.path} and {source.key} differ.\n  "
            f"expected: the same ones in the same shapes\n  found:\n{table_of(refused)}\n  cure: the sizes "
            f"of that folder for {source.key}; or, to go on without them, training.init_from.allow=[{listed}]"
        )
