"""The remote judge: a policy behind a websocket, ours or a peer's, plays our suites from our starts.

It speaks openpi's protocol (`serving/client.py`): uint8 pictures, the state, `prompt`; it gets `actions`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from tutti.config.run_config import RunConfig, load_config
from tutti.evaluation.closed_loop.rollouts import RolloutPolicy
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.evaluation.config import NO_SUITE
from tutti.evaluation.folder import EvaluationFolder, JudgedPolicy
from tutti.nested_dicts import content_hash
from tutti.runs.build import with_steps
from tutti.runs.folder import Redo
from tutti.runs.run_evaluation import play
from tutti.runs.terminal import print_line
from tutti.serving.client import Client, without_secrets
from tutti.suites.registry import find_suite
from tutti.types import UserError

PEERS_SIZE = 224
"""Pixels of a picture for a server that does not say its own size, as openpi's clients send them."""
PEERS_VIEWS = ("observation/image", "observation/wrist_image")
"""How openpi's client of LIBERO calls the first and the second view."""


@dataclass(frozen=True, slots=True)
class RemotePolicyFactory:
    """Connects in the process that plays. `keys` says how the server calls a view of the suite or "state"."""

    address: str = field(repr=False)
    metadata: Mapping[str, Any]
    token: str | None = field(default=None, repr=False)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the address, the server's description of itself, and the keys. A server that does not tell which
        weights it has may change them unseen."""
        return content_hash(
            {"address": without_secrets(self.address), "says": dict(self.metadata), "keys": dict(self.keys)},
            32,
        )

    def __call__(self) -> RolloutPolicy:
        return RemotePolicy(self, Client(self.address, self.token))


class RemotePolicy:
    """A `RolloutPolicy` that asks the server."""

    def __init__(self, factory: RemotePolicyFactory, client: Client) -> None:
        self.factory, self.client = factory, client

    def predict(
        self,
        images: Mapping[str, UInt8[np.ndarray, "h w 3"]] | None,
        state: Float32[np.ndarray, " s"],
        instruction: str,
        use_images: bool = True,
        continuing: object = None,
    ) -> Float32[np.ndarray, "t a"]:
        """Raises: UserError with the server's sentence, or where its answer has no rows of actions."""
        if images is None or continuing is not None:
            raise UserError(
                f"{self.client.address}: a remote policy needs pictures, and begins each chunk anew."
            )
        keys, own = self.factory.keys, self.factory.metadata.get("views")
        size = int(self.factory.metadata.get("image_size", PEERS_SIZE))
        sent: dict[str, Any] = {keys.get("state", "observation/state"): state, "prompt": instruction}
        for number, (view, picture) in enumerate(images.items()):
            usual = f"observation/images/{view}"
            if not own and number < len(PEERS_VIEWS):
                usual = PEERS_VIEWS[number]
            resized = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)
            sent[keys.get(view, usual)] = np.asarray(resized)
        actions = np.array(
            self.client.infer(sent).get("actions"), dtype=np.float32
        )  # the answer is read-only
        if actions.ndim != 2:
            raise UserError(
                f"{self.client.address}: expected actions of shape (steps, numbers), found {actions.shape}."
            )
        return actions


def evaluate_remote(
    address: str,
    overrides: Sequence[str] = (),
    *,
    to: Path | None = None,
    token: str | None = None,
    keys: Mapping[str, str] | None = None,
    redo: Redo = False,
) -> Path:
    """Plays the suite of `overrides` with the policy that the server has. Gives the folder of the evaluation,
    by default evaluations/HOST-PORT. Its no-image control is left out: a server cannot be told to look away.

    Raises: UserError if no server answers, or its actions are not those of the suite.
    """
    config = load_config(None, overrides)
    if config.evaluation.suite == NO_SUITE:
        raise UserError("evaluation.suite is none: a remote policy is judged by playing. Name a suite.")
    suite = find_suite(config.evaluation.suite)
    config = _played(with_steps(config, suite.fps), suite.max_decisions)
    settings = config.evaluation
    with Client(address, token) as client:
        metadata, shown = client.metadata, client.address
    told = metadata.get("actions")
    if isinstance(told, list) and len(told) != suite.action_dim:
        raise UserError(
            f"{shown}: its actions have {len(told)} numbers, those of the suite {suite.name} "
            f"{suite.action_dim}."
        )
    factory = RemotePolicyFactory(address, metadata, token, keys or {})
    name = re.sub(r"[^A-Za-z0-9._]+", "-", shown.partition("://")[2]).strip("-")
    folder = to or Path("evaluations") / name
    evaluation, print_ = EvaluationFolder(folder, "--to FOLDER"), factory.fingerprint
    judged = JudgedPolicy(checkpoint=shown, weights="remote", files=print_, fingerprint=print_)
    with evaluation.locked():
        todo, line = evaluation.begin(settings, judged, suite.fingerprint, redo)
        print_line(f"evaluate: {line}")
        if todo:
            play(
                settings,
                evaluation,
                factory,
                suite,
                trained=TrainingStarts(unknown=(shown,)),
                judged=shown,
            )
            evaluation.finish()
    return folder


def _played(config: RunConfig, limit: int) -> RunConfig:
    settings = config.evaluation
    controls = settings.controls.model_copy(update={"no_image": 0})
    limit = limit if settings.max_decisions == "suite" else settings.max_decisions
    changed = settings.model_copy(update={"controls": controls, "max_decisions": limit})
    return config.model_copy(update={"evaluation": changed})
