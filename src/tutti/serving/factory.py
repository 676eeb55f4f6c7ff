"""The policy of a checkpoint, built in whichever process plays it, and the hash of all that it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32

from tutti import __version__
from tutti.chunks import Continuation
from tutti.key_effects import with_effect
from tutti.models.vla import VLA
from tutti.plugin import Trust
from tutti.serving.contents import read_model_config
from tutti.serving.observation import Pictures, State, Text
from tutti.serving.policy import Policy
from tutti.storage.checkpoint import find_checkpoint, listed
from tutti.storage.manifest import CONVENTIONS, DATA_FILES, Weights
from tutti.storage.tensors import read_weights
from tutti.types import History, UserError


@dataclass(frozen=True, slots=True)
class WithoutState:
    """A policy that was trained without a state, in a simulator that has one."""

    policy: Policy

    @property
    def model(self) -> VLA:
        """The policy's model."""
        return self.policy.model

    def predict(
        self,
        images: Pictures,
        state: State,
        instruction: Text,
        use_images: bool = True,
        *,
        continuing: Continuation | None = None,
        history: History | None = None,
    ) -> Float32[np.ndarray, "t a"]:
        """The policy's chunk, whatever the state."""
        told = {"continuing": continuing, "history": history}
        return self.policy.predict(images, None, instruction, use_images, **told)

    def predict_many(
        self,
        observations: Sequence[tuple[Pictures, State, Text]],
        histories: Sequence[History] = (),
        use_images: bool | Sequence[bool] = True,
    ) -> list[Float32[np.ndarray, "t a"] | UserError]:
        """The policy's chunks, whatever the states."""
        without = [(images, None, text) for images, _, text in observations]
        return self.policy.predict_many(without, histories, use_images)

    def for_another_robot(self) -> WithoutState:
        """Of the policy."""
        return WithoutState(self.policy.for_another_robot())

    @property
    def remembers(self) -> bool:
        """Whether the policy does."""
        return self.policy.remembers

    def reset(self) -> None:
        """Of the policy."""
        self.policy.reset()

    def observe(self, images: Pictures, state: State, time: float, use_images: bool = True) -> History | None:
        """Of the policy, whatever the state."""
        return self.policy.observe(images, None, time, use_images)


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
    embodiment: str | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        folder = listed(find_checkpoint(self.path))
        config = read_model_config(folder, self.trust_code)
        model = with_effect({"model": config.model_dump(mode="json")})["model"]
        about = {"clip": self.clip, "model": model, "torch": torch.__version__, "tutti": __version__}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
        for name in (*DATA_FILES, *(name for name in (CONVENTIONS,) if name in folder.files)):
            digest.update(hashlib.sha256(folder.read(name)).digest())
        for name, value in sorted(read_weights(folder, self.weights).items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        object.__setattr__(self, "path", folder.folder)
        object.__setattr__(self, "fingerprint", digest.hexdigest())

    def __call__(self) -> Policy | WithoutState:
        trust = self.trust_code
        robot, clip = self.embodiment, self.clip
        policy = Policy.load(
            self.path, self.weights, embodiment=robot, clip=clip, trust_code=trust, warn=False
        )
        return policy if policy.spec.state_dim else WithoutState(policy)
