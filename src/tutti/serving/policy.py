"""Policy: a checkpoint that predicts a chunk of actions from images, state and instruction; its export."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from safetensors.torch import save

from tutti import __version__
from tutti.data.cache import resize_images
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.models.vla import VLA
from tutti.plugin import Trust
from tutti.serving.contents import (
    another_model,
    read_model,
    read_model_config,
    read_normalizer,
    read_tokenizer,
)
from tutti.storage.checkpoint import find_checkpoint, listed
from tutti.storage.files import explain_disk_errors, megabytes, write_folder
from tutti.storage.manifest import DATA_FILES, EXPORT, POLICY_FILES, WEIGHTS, Weights, size_of
from tutti.storage.tensors import check_finite, read_weights, weights_in
from tutti.types import DataSpec, Tokens, UserError

MAX_INSTRUCTIONS = 256  # encodings kept; the oldest goes first


class Policy:
    """Predicts a chunk of actions. A pure function of its arguments: no history, no noise."""

    def __init__(
        self,
        model: VLA,
        normalizer: Normalizer,
        tokenizer: Tokenizer,
        *,
        embodiment: str | None = None,
        clip: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """`clip` keeps actions inside the smallest and largest value that the training data has per
        dimension.

        `embodiment` may be left out where the data has only one. Raises UserError where there are several.
        """
        self.spec: DataSpec = model.spec
        self.model = model.eval().to(device)
        self.normalizer = normalizer
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        known = self.spec.embodiments
        if embodiment is None and len(known) == 1:
            embodiment = known[0]
        if embodiment is None or embodiment not in known:
            raise UserError(f"embodiment: expected one of {', '.join(known)}, got {embodiment!r}.")
        self.embodiment = embodiment
        normalizer.check(self.embodiment, self.spec.state_dim, self.spec.action_dim)
        stats = normalizer.stats[self.embodiment].action
        bounds = (stats.min.astype(np.float32), stats.max.astype(np.float32))
        self._bounds = bounds if clip else None
        self._encoded: dict[str, Tokens] = {}

    @classmethod
    def load(
        cls,
        checkpoint: Path | str,
        weights: Weights = "ema",
        *,
        embodiment: str | None = None,
        clip: bool = True,
        device: torch.device | str = "cpu",
        trust_code: Trust = False,
    ) -> Self:
        """From a checkpoint folder, or from a run's folder, whose newest checkpoint is taken.

        Reads model.safetensors ("raw") or ema.safetensors ("ema"; the raw weights where training kept no
        average), or the same out of shards/; spec.json, normalizer.json, tokenizer.json and config.yaml. Each
        has the checksum that state.json, or export.json, lists. `trust_code`: a class of the user's own that
        config.yaml names is imported.

        Raises UserError: a file is missing, damaged or does not fit the others, or a number is not finite.
        """
        folder = listed(find_checkpoint(Path(checkpoint)))
        config, spec = read_model(folder, weights, trust_code)
        normalizer, tokenizer = read_normalizer(folder, spec), read_tokenizer(folder, spec)
        model = config.build(spec)
        try:
            model.load_state_dict(read_weights(folder, weights), strict=True)
        except RuntimeError as error:
            raise another_model(folder.folder, error) from error
        check_finite(folder.folder, model.state_dict())  # as they are in the model's own type of numbers
        return cls(model, normalizer, tokenizer, embodiment=embodiment, clip=clip, device=device)

    def predict(
        self,
        images: UInt8[np.ndarray, "v h w 3"] | None,
        state: Float32[np.ndarray, " s"],
        instruction: str,
        use_images: bool = True,
    ) -> Float32[np.ndarray, "t a"]:
        """The next `horizon` actions in data units.

        `images` holds one image per view, in the order of `spec.views`, 0 to 255; another size than
        `spec.image_size` is resized as in training. `state` is in data units. `use_images=False` removes
        all vision tokens; `images` may then be None.

        Raises UserError where an argument has another shape or type than the model was trained on, or an
        action is not finite.
        """
        resized = self._images(images, use_images)
        if np.shape(state) != (self.spec.state_dim,) or not np.isfinite(state).all():
            raise UserError(
                f"state: expected {self.spec.state_dim} finite numbers in the data's units, got {state!r}."
            )
        normalised = self.normalizer.apply_state(np.asarray(state, np.float32), self.embodiment)
        with torch.inference_mode():
            mask = torch.full((1, len(self.spec.views)), use_images, device=self.device)
            vision = self.model.vision(self.model.prepare(resized), mask)
            state_tensor = torch.from_numpy(normalised)[None].to(self.device)
            language = self._language(instruction)
            features = self.model.fuse(vision, language, state_tensor)
            chunk = self.model.action.predict(features)[0].float().cpu().numpy()
        actions = self.normalizer.undo_action(chunk, self.embodiment)
        if not np.isfinite(actions).all():
            where = sorted(set(np.argwhere(~np.isfinite(actions))[:, 1].tolist()))
            raise UserError(
                f"the predicted action is not finite in dimension {', '.join(map(str, where))}. Nothing was "
                "given to the robot. The state may be far from those of the training data, or a number too "
                f"large for the model: {state!r:.200}."
            )
        return actions if self._bounds is None else np.clip(actions, *self._bounds)

    __call__ = predict

    def _language(self, instruction: str) -> Tokens:
        """The text's encoding, made once: the language encoder sees nothing but the text."""
        if not isinstance(instruction, str):
            raise UserError(f"instruction: expected a sentence, got {type(instruction).__name__}.")
        if instruction not in self._encoded:
            if len(self._encoded) >= MAX_INSTRUCTIONS:
                del self._encoded[next(iter(self._encoded))]
            ids, mask = self.tokenizer.encode([instruction])
            self._encoded[instruction] = self.model.language(ids.to(self.device), mask.to(self.device))
        return self._encoded[instruction]

    def _images(self, images: np.ndarray | None, use_images: bool) -> torch.Tensor:
        """Bytes (1, v, 3, size, size)."""
        count, size = len(self.spec.views), self.spec.image_size
        if not use_images:
            return torch.zeros(1, count, 3, size, size, dtype=torch.uint8, device=self.device)
        if (
            images is None
            or images.ndim != 4
            or images.dtype != np.uint8
            or (images.shape[0], images.shape[3]) != (count, 3)
        ):
            found = "None" if images is None else f"{images.dtype} {tuple(images.shape)}"
            raise UserError(
                f"images: expected uint8 ({count}, height, width, 3), one image for each view "
                f"({', '.join(self.spec.views)}), got {found}."
            )
        return torch.from_numpy(resize_images(images, size))[None].to(self.device)


@dataclass(frozen=True, slots=True)
class CheckpointPolicyFactory:
    """Builds the same policy in any process: `evaluation` sends it to its workers.

    `fingerprint` is the hash of all that decides what the policy does: weights, spec, normaliser, tokenizer,
    the model section of its config with the defaults filled in, `clip`, and the versions of torch and Tutti.
    Of a class of the user's own, it knows the name and the options, not the code.
    """

    path: Path
    weights: Weights = "ema"
    clip: bool = True
    trust_code: Trust = False
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        folder = listed(find_checkpoint(self.path))
        model = read_model_config(folder, self.trust_code).model_dump(mode="json")
        about = {"clip": self.clip, "model": model, "torch": torch.__version__, "tutti": __version__}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name in DATA_FILES:
            digest.update(hashlib.sha256(folder.read(name)).digest())
        for name, value in sorted(read_weights(folder, self.weights).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        object.__setattr__(self, "path", folder.folder)
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def __call__(self) -> Policy:
        return Policy.load(self.path, self.weights, clip=self.clip, trust_code=self.trust_code)


def export_policy(
    run: Path | str,
    to: Path | str,
    weights: Weights = "ema",
    checkpoint: int | str = "latest",
    *,
    trust_code: Trust = False,
) -> Path:
    """Writes `to`: model.safetensors (the moving average, or the raw weights; where training kept no average,
    the raw ones), config.yaml, spec.json, normalizer.json, tokenizer.json, and export.json, which says where
    they come from and lists the size and SHA-256 of each. `Policy.load(to)` reads it, without the run and its
    data.

    The folder appears whole or not at all, and only after a policy could be loaded from it. Gives the folder.
    `trust_code`: an action decoder of the user's own is imported for that.

    Raises: UserError if there is no such checkpoint, it is damaged, its weights are not finite, `to` exists,
    or the disk is full.
    """
    source, to = listed(find_checkpoint(Path(run), checkpoint)), Path(to)
    if to.exists():
        raise UserError(f"{to} exists. Give --to a folder that does not, or delete this one.")
    weights, _ = weights_in(source, weights)
    read_model(source, weights, trust_code)
    tensors = read_weights(source, weights)
    content = {WEIGHTS["raw"]: save(tensors)} | {name: source.read(name) for name in POLICY_FILES}
    about = {
        "checkpoint": source.folder.name,
        "weights": weights,
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "files": {name: size_of(data, "sha256") for name, data in content.items()},
    }
    needed = megabytes(sum(map(len, content.values())))
    with explain_disk_errors(to, "the export", needed), write_folder(to) as folder:
        for name, data in content.items():
            (folder / name).write_bytes(data)
        (folder / EXPORT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        Policy.load(folder, trust_code=trust_code)
    return to
