"""The keys of a pre-trained tower, and what its folder says: architecture, SHA-256 of the weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, PositiveInt, field_validator, model_validator
from torch import Tensor

from tutti.frozen_config import FrozenConfig
from tutti.models.pretrained.facts import FACTS, SECTIONS, Colours, Facts, Socket, kinds, of_pi0
from tutti.models.pretrained.hub import HUB, hub_folder, transformers
from tutti.nested_dicts import merge
from tutti.storage.reading import read_json, shown
from tutti.storage.text_source import TextSource
from tutti.types import UserError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PICTURE_FILE, PROCESSOR_FILE = "preprocessor_config.json", "processor_config.json"
USUAL_SIZE, PLACE = 224, "{instruction}"
LEFT_OUT = ("auto_map", "quantization_config", "attn_implementation", "_attn_implementation")
LEFT_OUT += ("dtype", "torch_dtype", "id2label", "label2id")
"""Keys of a config.json that would run code, fetch kernels, make other numbers, or name classes."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class LoraConfig(FrozenConfig):
    """`learn: {lora: 16}`: the tower's own weights stay, thin matrices of this rank beside them learn."""

    lora: PositiveInt = Field(description="Rank of the matrices beside each linear layer of the blocks.")


class FolderConfig(FrozenConfig):
    """The keys of whatever comes out of a folder that others have saved."""

    socket: ClassVar[Socket]

    path: Path = Field(
        description="Folder with config.json and model.safetensors, as transformers saves it; or hf:NAME, a "
        "model of the hub that is in its local cache, or may be fetched (tutti --download)."
    )
    weights: Literal["pretrained", "random"] = Field(
        default="pretrained",
        description="random: the same network from scratch, the control of what pre-training gives.",
    )
    learn: Literal["all", "none"] | LoraConfig = Field(
        default="all", description="all of its weights, none (frozen for ever), or {lora: RANK} beside them."
    )
    architecture: dict[str, Any] | Literal["auto"] = Field(
        default="auto", description="The tower's config.json; auto: that of the folder. Checkpoints hold it."
    )
    sha256: Sha256 | Literal["auto"] = Field(
        default="auto", description="What the weights' SHA-256 must be; auto: any. Checkpoints hold it."
    )

    @property
    def key(self) -> str:
        """Where it stands in a config."""
        return f"model.{self.socket}"

    @property
    def folder(self) -> Path:
        """Where it lies. Raises: UserError if it is a model of the hub, and not here."""
        name = str(self.path)
        return hub_folder(name.removeprefix(HUB), self.key) if name.startswith(HUB) else self.path

    def values(self) -> dict[str, Any]:
        """The tower's own config as plain values: that of the section for this socket.

        Raises: UserError if there is none, or it is of a kind that is not in the table.
        """
        found = read_json(self.file(CONFIG_FILE)) if self.architecture == "auto" else self.architecture
        kind = str(found.get("model_type"))
        if (kind, self.socket) in SECTIONS:
            section, kind = SECTIONS[kind, self.socket]
            found = {**(found.get(section) or {}), "model_type": kind}
        if self.socket == "vlm" and (parts := of_pi0(found)) is not None:
            found, kind = parts, "paligemma"
        if kind not in FACTS or FACTS[kind].socket != self.socket:
            raise UserError(
                f"{self.key}.path: {self.folder / CONFIG_FILE} has model_type {shown(kind)}.\n  expected: "
                f"one of {', '.join(kinds(self.socket))}\n  cure: name the folder of such a tower"
            )
        return _plain(found)

    def all_values(self) -> dict[str, Any]:
        """The same with the defaults of its kind, which files of a hub leave out.

        Raises: UserError as `values`, or if transformers is not installed or refuses them.
        """
        values = self.values()
        if not FACTS[values["model_type"]].network:
            return values
        try:
            return merge(described(transformers(self.key), values).to_dict(), values)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise UserError(
                f"{self.key}: the config.json of {self.path} cannot be used "
                f"({shown(str(error), 300, quoted=False)})."
            ) from error

    def facts(self) -> Facts:
        """What is known of its kind."""
        return FACTS[self.values()["model_type"]]

    def resolved(self) -> Self:
        """The same with what a checkpoint must hold, so that it needs the folder for frozen weights alone."""
        hub = str(self.path).startswith(HUB)
        place = self.path if hub else self.path.resolve()
        known: dict[str, Any] = {"architecture": self.values(), "path": place}
        if self.weights == "pretrained":
            known["sha256"] = weights_hash(self)
        return self.model_copy(update=known)

    def exported(self) -> Self:
        """The same for an export, which holds all weights, LoRA's factors merged."""
        merged = {} if isinstance(self.learn, str) else {"learn": "none"}
        return self.model_copy(update={"path": Path(self.path.name), **merged})

    def file(self, name: str) -> Path:
        """A file of the folder. Raises: UserError if it is not there."""
        if not (path := self.folder / name).is_file():
            raise UserError(
                f"{self.key}.path: {path} is not there.\n  expected: the folder of a tower, with "
                f"{CONFIG_FILE} and {WEIGHTS_FILE}\n  cure: name it, or save one by transformers' "
                "save_pretrained; nothing is downloaded, and nothing else than safetensors is read"
            )
        return path


class TowerConfig(FolderConfig):
    """The keys of a pre-trained tower in either socket."""

    layer: int | Annotated[tuple[int, ...], Field(min_length=2, max_length=64)] = Field(
        default=-1,
        description="What is read: -1 the network's output; n or -n the hidden state behind a block, as "
        "hidden_states[n] of transformers; of a convolutional tower the map of stage n. What lies behind is "
        "removed. A list: these side by side, brought to the tower's width by a linear layer that learns.",
    )
    remember: int = Field(
        default=0,
        ge=0,
        description="MiB of tokens that a tower with learn: none keeps on a CPU, so that it computes a "
        "picture or a text once and not in each epoch; it then computes each alone. 0: none.",
    )

    @model_validator(mode="after")
    def _remembers_what_stays(self) -> Self:
        if self.remember and self.learn != "none":
            raise ValueError("remember is for learn: none; the tokens of a tower that learns change")
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        """What is read, as a list."""
        return (self.layer,) if isinstance(self.layer, int) else self.layer


class PicturesConfig(FolderConfig):
    """The keys of what is shown pictures."""

    interpolate: bool = Field(
        default=False,
        description="true: positions are interpolated to another picture size than the tower's.",
    )
    mean: Colours | Literal["auto"] = Field(
        default="auto", description="Mean of the colours, 0 to 1; auto: that of the folder, or of the kind."
    )
    std: Colours | Literal["auto"] = Field(
        default="auto", description="Deviation of the colours; auto: that of the folder, or of the kind."
    )

    def colours(self) -> tuple[Colours, Colours]:
        """Mean and deviation of red, green and blue, of pictures from 0 to 1."""
        said, facts = self._said(), self.facts()

        def chosen(given: Colours | Literal["auto"], key: str, usual: Colours) -> Colours:
            own = said.get(key)
            three = (
                isinstance(own, list) and len(own) == 3 and all(isinstance(one, int | float) for one in own)
            )
            return given if given != "auto" else tuple(map(float, own)) if three else usual  # pyright: ignore

        return chosen(self.mean, "image_mean", facts.mean), chosen(self.std, "image_std", facts.std)

    def picture_size(self) -> int:
        """The edge of the square pictures that it was trained with, in pixels; as far as its files tell, else
        the 224 of ImageNet's. Qwen's files call numbers of pixels edges, and it takes any size: 224."""
        if self.facts().grid:
            return USUAL_SIZE
        said, values = self._said(), self.all_values()
        own = values.get("vision_config", values).get("image_size")
        for size in (own, said.get("crop_size"), said.get("size")):
            given = size if isinstance(size, dict) else {"height": size}
            for edge in (given.get("height"), given.get("shortest_edge")):
                if type(edge) is int and edge > 0:
                    return edge
        return USUAL_SIZE

    def _said(self) -> dict[str, Any]:
        """What the file beside the weights says of pictures; transformers 5 saves it as a section of that of
        a VLM's processor."""
        if self.architecture != "auto":
            return {}
        if (path := self.folder / PICTURE_FILE).is_file():
            return read_json(path)
        whole = self.folder / PROCESSOR_FILE
        found: Any = read_json(whole).get("image_processor") if whole.is_file() else None
        return found if isinstance(found, dict) else {}

    def resolved(self) -> Self:
        """With the colours, too."""
        mean, std = self.colours()
        return super().resolved().model_copy(update={"mean": mean, "std": std})

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (3, 1, 1), of x in [-1, 1] to the tower's colours ((x + 1) / 2 - mean) / std."""
        mean, std = (torch.tensor(three)[:, None, None] for three in self.colours())
        return 0.5 / std, (0.5 - mean) / std

    def check_size(self, size: int, patch: int, own: int) -> bool:
        """Whether positions are stretched: pictures have another size than the tower's `own`.

        Raises: UserError if it takes no pictures of this size.
        """
        if size % patch:
            near = sorted({max(1, size // patch) * patch, (size // patch + 1) * patch})
            raise UserError(
                f"data.image_size is {size}, but the patches of {self.key} are {patch} pixels wide.\n  "
                f"expected: a multiple\n  cure: data.image_size={own if own % patch == 0 else near[-1]}"
            )
        if size == own or (sizes := self.facts().sizes) == "any":
            return False
        if sizes == "own" or not self.interpolate:
            cure = "" if sizes == "own" else f", or {self.key}.interpolate=true, to stretch its positions"
            raise UserError(
                f"data.image_size is {size}, but {self.key} was trained on pictures of {own} pixels.\n  "
                f"cure: data.image_size={own}{cure}"
            )
        return True


class TextsConfig(FolderConfig):
    """The keys of what reads texts, by its own tokenizer."""

    template: str = Field(
        default=PLACE, max_length=1000, description="What the tower is told, with {instruction} in it."
    )

    output_layer: bool = Field(
        default=False,
        description="true: its output layer comes along, where that is not the word embedding: to write "
        "answers or actions. It learns or stays as `learn` says, as the embedding does.",
    )

    @field_validator("template")
    @classmethod
    def _has_place(cls, template: str) -> str:
        if template.count(PLACE) != 1:
            raise ValueError(f"expected {PLACE} in it once")
        return template

    def writes_apart(self) -> bool:
        """Whether the tower has an output layer of its own here. Raises: UserError if its kind has none."""
        if not self.output_layer:
            return False
        if self.socket == "language" and self.facts().tail != "norm":
            kind = self.values()["model_type"]
            raise UserError(
                f"{self.key}.output_layer is true, but a {kind} writes no texts. Set it to false."
            )
        return not self.all_values().get("tie_word_embeddings")

    def source(self) -> TextSource:
        """For the tokenizer."""
        facts, values = self.facts(), self.all_values()
        longest = values.get("max_position_embeddings", 512)
        most = None if facts.positions is None else int(longest) - facts.positions
        before, behind = self.template.split(PLACE)
        own, ends = values.get("text_config", values), values.get("eos_token_id")
        if ends is None:  # a VLM's is that of its language model
            ends = own.get("eos_token_id")
        end = ends[0] if isinstance(ends, list) and ends else ends
        end = end if type(end) is int and end >= 0 else 0
        rows = own.get("vocab_size")
        return TextSource(folder=self.folder, around=(before, behind), longest=most, end=end, rows=rows)


def described(library: ModuleType, values: Mapping[str, Any], *, whole: bool = False) -> Any:
    """The config that transformers makes of plain values; of pi0 that of the VLM, or of the `whole`."""
    own = {key: value for key, value in values.items() if key != "action_expert"}
    if whole and (expert := values.get("action_expert")) is not None:
        own = {**expert, "model_type": "pi0", "vlm_config": own}
    return library.AutoConfig.for_model(**own)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without `LEFT_OUT`, at any depth."""
    kept = {key: value for key, value in values.items() if key not in LEFT_OUT}
    return {key: _plain(value) if isinstance(value, Mapping) else value for key, value in kept.items()}


def weights_hash(config: FolderConfig) -> str:
    """SHA-256 of the weights, the files of a sharded tower one after the other in the order of their names.

    Raises: UserError if there are none, or they are not those that the config asks for.
    """
    index = config.folder / f"{WEIGHTS_FILE}.index.json"
    names = [WEIGHTS_FILE]
    whole = (config.folder / WEIGHTS_FILE).is_file()  # where both are there, transformers reads the one file
    if not whole and index.is_file() and isinstance(table := read_json(index).get("weight_map"), dict):
        names = sorted({Path(str(name)).name for name in table.values()})
    files = [config.file(name) for name in names]
    found = _hash(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))
    if config.sha256 not in ("auto", found):
        raise UserError(
            f"{config.path}: the weights have SHA-256 {found}.\n  expected: {config.sha256}, as {config.key}."
            "sha256 or the checkpoint says\n  cure: put those weights back, or use an export: it has its own"
        )
    return found


@cache
def _hash(files: tuple[tuple[str, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, _, _ in files:
        with Path(path).open("rb") as file:
            while piece := file.read(1 << 24):
                digest.update(piece)
    return digest.hexdigest()
