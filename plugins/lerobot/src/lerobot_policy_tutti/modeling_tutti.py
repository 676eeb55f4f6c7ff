"""The policy type `tutti`: Tutti's own model and `Policy`, called as LeRobot calls its policies."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor

from tutti.chunks import QueueRunner
from tutti.data.cache.decoding import resize_images
from tutti.data.conventions.served import Served
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.models.config import ModelConfig
from tutti.serving.policy import Policy
from tutti.types import Batch, DataSpec, Observation, UserError, masked_mean

from .configuration_tutti import TuttiConfig

ROBOT = "robot"


class TuttiPolicy(PreTrainedPolicy):
    """Chunks of actions in data units; LeRobot's processors neither normalise before nor after."""

    config_class = TuttiConfig
    name = "tutti"

    def __init__(
        self, config: TuttiConfig, dataset_stats: Any = None, dataset_meta: Any = None, **_: Any
    ) -> None:
        super().__init__(config)
        config.validate_features()
        self.config: TuttiConfig = config
        if not config.spec:
            _fill(config, dataset_meta)
        values: dict[str, Any] = json.loads(config.spec)
        self.spec = DataSpec(
            **{name: tuple(one) if isinstance(one, list) else one for name, one in values.items()}
        )
        self.normalizer = Normalizer.from_dict(json.loads(config.normalizer))
        self.tokenizer = Tokenizer.from_json(config.tokenizer)
        self.served = Served.model_validate_json(config.conventions) if config.conventions else None
        self.model = ModelConfig.model_validate(json.loads(config.model)).build(self.spec)
        self._acting: Policy | None = None
        self.reset()

    @classmethod
    def _load_as_safetensor(cls, model: TuttiPolicy, model_file: str, map_location: str, strict: bool) -> Any:
        """LeRobot lets missing and unknown weights pass with a line in the log; here they are an error."""
        return super()._load_as_safetensor(model, model_file, map_location, strict=True)

    def get_optim_params(self) -> Any:
        # LeRobot saves the moments, which lie as the parameters do, with safetensors: contiguous alone.
        for one in self.parameters():
            one.data = one.data.contiguous()
        return self.parameters()

    def reset(self) -> None:
        self._runner = QueueRunner(self.config.n_action_steps)

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The masked mean of the action term's error.

        Raises: UserError for a policy with conventions: a data set does not say in which its numbers are.
        """
        if self.served is not None:
            raise UserError(
                "policy type tutti: this policy answers in the conventions of its robot, and LeRobot's data "
                "sets do not say theirs.\n  cure: go on with `tutti train`, which reads the same data sets."
            )
        actions, absent = batch[ACTION], batch["action_is_pad"]
        count = torch.zeros(len(actions), dtype=torch.long, device=actions.device)
        windows = Batch(
            observation=self._observation(batch),
            actions=self.normalizer.apply_action(actions, self.spec.embodiments[0]),
            action_mask=(~absent)[..., None].expand_as(actions),
            instruction_id=count,
            embodiment=count,
            window=count,
        )
        error = self.model.action(self.model(windows.observation), windows)
        loss = masked_mean(error, windows.action_mask)
        return loss, {"action": loss.item()}

    def _observation(self, batch: dict[str, Any]) -> Observation:
        device, size = batch[ACTION].device, self.spec.image_size
        views = [_bytes_of(batch[view]) for view in self.spec.views]
        images = np.stack([resize_images(view, size) for view in views], axis=1)
        text, text_mask = self.tokenizer.encode(list(batch["task"]))
        rows = len(images)
        state = batch[OBS_STATE] if self.spec.state_dim else torch.zeros(rows, 0, device=device)
        return Observation(
            images=torch.from_numpy(images).to(device),
            image_mask=torch.ones(rows, len(views), dtype=torch.bool, device=device),
            text=text.to(device),
            text_mask=text_mask.to(device),
            state=self.normalizer.apply_state(state, self.spec.embodiments[0]),
            state_mask=torch.ones(rows, dtype=torch.bool, device=device),
        )

    @torch.no_grad()
    def predict_action_chunk(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """(b, t, a), as `tutti.Policy` gives it: of one row to the last bit."""
        self.eval()
        device = next(self.model.parameters()).device
        if self._acting is None or self._acting.device != device:
            self._acting = Policy(
                *(self.model, self.normalizer, self.tokenizer), device=device, warn=False, served=self.served
            )
        views = {view: _bytes_of(batch[_key(view)]) for view in self.spec.views}
        states = batch[OBS_STATE].float().cpu().numpy() if self.spec.state_dim else None
        tasks = batch["task"]
        rows = [
            (
                {view: pictures[row] for view, pictures in views.items()},
                None if states is None else states[row],
                task,
            )
            for row, task in enumerate([tasks] if isinstance(tasks, str) else tasks)
        ]
        chunks = self._acting.predict_many(rows)
        for one in chunks:
            if isinstance(one, UserError):
                raise one
        return torch.from_numpy(np.stack(chunks)).to(device)

    @torch.no_grad()
    def select_action(self, batch: dict[str, Any], **_: Any) -> Tensor:
        """(b, a): the first `n_action_steps` of each chunk, one after the other."""
        device = next(self.model.parameters()).device
        row = self._runner.act(lambda _: self.predict_action_chunk(batch).transpose(0, 1).cpu().numpy())
        return torch.from_numpy(row).to(device)


def _key(view: str) -> str:
    return view if view.startswith("observation.") else f"observation.images.{view}"


def _bytes_of(pictures: Tensor) -> np.ndarray:
    """Floats in [0, 1], channels first, or bytes, as bytes with the channels last."""
    if pictures.dtype != torch.uint8:
        pictures = (pictures.float().clamp(0, 1) * 255).round().to(torch.uint8)
    return pictures.cpu().numpy().transpose(0, 2, 3, 1)


def _fill(config: TuttiConfig, meta: Any) -> None:
    """What a training knows of its data set, into the config, which is saved with the weights."""
    if meta is None:
        raise UserError(
            "policy type tutti: expected a data set to train on, or a folder of `tutti export --for lerobot`."
        )
    state, action = config.robot_state_feature, config.action_feature
    assert action is not None
    tokenizer = Tokenizer.fit([str(text) for text in meta.tasks.index], 4096)
    sizes = {"state": state.shape[0] if state else 0, "action": action.shape[0]}
    keys = {"state": OBS_STATE, "action": ACTION}
    numbers = {}
    for what, size in sizes.items():
        stats = {name: np.ravel(one).tolist() for name, one in meta.stats[keys[what]].items()} if size else {}
        names = ("min", "max", "mean", "std", "q01", "q99")
        given = {name: stats.get(name, []) for name in names}
        given["q01"], given["q99"] = given["min"], given["max"]  # LeRobot's own are no quantiles of the data
        numbers[what] = given
    spec = DataSpec(
        views=tuple(config.image_features),
        image_size=config.image_size,
        state_dim=sizes["state"],
        action_dim=sizes["action"],
        horizon=config.chunk_size,
        vocab_size=tokenizer.vocab_size,
        text_length=tokenizer.text_length,
        embodiments=(ROBOT,),
        fps=float(meta.fps),
    )
    config.spec, config.tokenizer = json.dumps(asdict(spec)), tokenizer.to_json()
    config.normalizer = json.dumps({"kind": "standard", "stats": {ROBOT: numbers}})
