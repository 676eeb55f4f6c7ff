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

from tutti.config.run_config import load_config
from tutti.evaluation.closed_loop.rollouts import RolloutPolicy
from tutti.evaluation.closed_loop.starts import TrainingStarts
from tutti.evaluation.config import NO_SUITE
from tutti.evaluation.folder import EvaluationFolder, JudgedPolicy
from tutti.nested_dicts import content_hash, indented
from tutti.runs.build import with_steps
from tutti.runs.folder import Redo
from tutti.runs.run_evaluation import play
from tutti.runs.terminal import print_line
from tutti.serving.client import Client, without_secrets
from tutti.serving.wire import pack
from tutti.suites.environment import Suite
from tutti.suites.registry import find_suite
from tutti.types import UserError

PEERS_SIZE = 224
"""Pixels of a picture for a server that does not say its own size, as openpi's clients send them."""
PEERS_VIEWS = ("observation/image", "observation/wrist_image")
"""How openpi's client of LIBERO calls the first and the second view."""


@dataclass(frozen=True, slots=True)
class RemotePolicyFactory:
    """Connects in the process that plays. An action has `action_dim` numbers. `keys` says how the server
    calls a view of the suite or "state"."""

    address: str = field(repr=False)
    metadata: Mapping[str, Any]
    action_dim: int
    token: str | None = field(default=None, repr=False)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Of the address, the server's description of itself, and the keys. A server that does not tell which
        weights it has may change them unseen."""
        says = pack(dict(self.metadata)).hex()  # a peer's may hold arrays
        return content_hash(
            {"address": without_secrets(self.address), "says": says, "keys": dict(self.keys)}, 32
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
        """Raises: UserError with the server's sentence, or where its answer has no such actions."""
        if images is None or continuing is not None:
            raise UserError(
                f"{self.client.address}: a remote policy needs pictures, and begins each chunk anew."
            )
        keys, own = self.factory.keys, self.factory.metadata.get("views")
        size = self.factory.metadata.get("image_size", PEERS_SIZE)
        sent: dict[str, Any] = {keys.get("state", "observation/state"): state, "prompt": instruction}
        for number, (view, picture) in enumerate(images.items()):
            usual = f"observation/images/{view}"
            if not own and number < len(PEERS_VIEWS):
                usual = PEERS_VIEWS[number]
            resized = Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR)
            sent[keys.get(view, usual)] = np.asarray(resized)
        answer, width = self.client.infer(sent).get("actions"), self.factory.action_dim
        found = getattr(answer, "shape", f"a {type(answer).__name__}")
        try:
            actions = np.array(answer, dtype=np.float32)  # a copy: the answer is read-only
        except (TypeError, ValueError):  # no numbers, or rows of several lengths
            actions = np.zeros((0, 0), np.float32)
        if actions.ndim != 2 or len(actions) == 0 or actions.shape[-1] != width:
            raise UserError(
                f"{self.client.address}: expected actions of shape (steps, {width}), at least one step, "
                f"found {found}."
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

    Raises: UserError if no server answers, or what it says of itself does not fit the suite.
    """
    config = load_config(None, overrides)
    if config.evaluation.suite == NO_SUITE:
        raise UserError("evaluation.suite is none: a remote policy is judged by playing. Name a suite.")
    suite = find_suite(config.evaluation.suite)
    settings = with_steps(config, suite.fps).evaluation
    controls = settings.controls.model_copy(update={"no_image": 0})
    settings = settings.model_copy(update={"controls": controls, "max_decisions": settings.limit(suite)})
    with Client(address, token) as client:
        metadata, shown = client.metadata, client.address
    _check_fit(metadata, suite, shown)
    factory = RemotePolicyFactory(address, metadata, suite.action_dim, token, keys or {})
    name = re.sub(r"[^A-Za-z0-9._]+", "-", shown.partition("://")[2]).strip("-")
    folder = to or Path("evaluations") / name
    evaluation, print_ = EvaluationFolder(folder, "--to FOLDER"), factory.fingerprint
    judged = JudgedPolicy(checkpoint=shown, weights="remote", files=print_, fingerprint=print_)
    with evaluation.locked():
        todo, line = evaluation.begin(settings, judged, suite.fingerprint, redo)
        print_line(f"evaluate: {line}")
        if todo:
            trained = TrainingStarts(unknown=(shown,))
            play(settings, evaluation, factory, suite, trained=trained, judged=shown)
            evaluation.finish()
    return folder


def _check_fit(metadata: Mapping[str, Any], suite: Suite, shown: str) -> None:
    """Raises: UserError with all that the server says of itself and that does not fit; much is not said."""
    own = {"actions": suite.action_dim, "state": suite.state_dim, "fps": suite.fps}
    lists = ("actions", "state") if metadata.get("needs_state") is True else ("actions",)
    said = {key: len(one) for key in lists if isinstance(one := metadata.get(key), list)}
    said |= {"fps": fps} if isinstance(fps := metadata.get("fps"), int | float) else {}
    differ = [
        f"{key}: the policy has {one:g}, the suite {own[key]:g}"
        for key, one in said.items()
        if f"{one:g}" != f"{own[key]:g}"
    ]
    if not isinstance(size := metadata.get("image_size", PEERS_SIZE), int) or size < 1:
        differ.append(f"image_size: expected the edge of its square pictures in pixels, found {size!r:.80}")
    if differ:
        raise UserError(
            f"{shown}: its policy does not fit the suite {suite.name}.\n{indented(differ)}\n"
            "  cure: name the suite that it was trained for (evaluation.suite=NAME)."
        )
