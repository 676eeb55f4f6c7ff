"""Chunks of actions of checked observations: normalised, predicted in one pass, and back in data units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8

from tutti.chunks import Continuation
from tutti.data.normalize import Normalizer
from tutti.models.vla import VLA
from tutti.serving.prediction.memory import joined
from tutti.serving.prediction.place import Place
from tutti.serving.prediction.texts import EncodedTexts
from tutti.types import History, UserError, dimension_label


class Prepared(NamedTuple):
    """What a policy looks at, checked: pictures of its size, the state as it is learned, the sentence."""

    images: UInt8[torch.Tensor, "1 v 3 s s"]
    state: Float32[np.ndarray, " s"]
    text: str
    past: History | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPrediction:
    """The model with all that its numbers go through. Actions are kept inside of `bounds`, as they are
    learned; of a chunk the first steps are given, as many as the robot's own horizon has."""

    model: VLA
    normalizer: Normalizer
    place: Place
    texts: EncodedTexts
    bounds: tuple[Float32[np.ndarray, " a"], Float32[np.ndarray, " a"]] | None

    def __call__(
        self,
        given: Sequence[Prepared],
        use_images: bool | Sequence[bool] = True,
        continuing: Continuation | None = None,
    ) -> Float32[np.ndarray, "b t a"]:
        """The normalised chunks of a batch, in one pass. `use_images`: of all, or of each."""
        states = self.normalizer.apply_state(np.stack([one.state for one in given]), self.place.name)
        device = given[0].images.device
        with torch.inference_mode():
            looks = np.broadcast_to(np.asarray(use_images), len(given))
            mask = torch.from_numpy(self.place.shown & looks[:, None]).to(device)
            images = torch.cat([one.images for one in given])
            vision = self.model.vision(self.model.prepare(images), mask)
            state = torch.from_numpy(self.place.state(states)).to(device)
            past = [one.past for one in given if one.past is not None]
            features = self.model.fuse(
                vision,
                self.texts([one.text for one in given]),
                state,
                mask.new_full((len(given),), self.place.feels),
                self.model.recall(joined(past) if past else None),
                robots=self.place.rows(len(given), device),
            )
            if continuing is None:
                chunks = self.model.action.predict(features)
            else:
                told = continuing.padded(self.model.spec.horizon)
                convert = self.place.conversion.learn_chunk if self.place.conversion else np.asarray
                target = self.normalizer.apply_action(convert(told.actions), self.place.name)
                chunks = self.model.action.predict_continuing(
                    features,
                    torch.from_numpy(self.place.chunk(target)).to(device),
                    torch.from_numpy(told.weights).to(device),
                    told.guidance,
                )
        # Of a source of another rate than the highest the later steps have never been trained.
        return chunks[:, : self.place.spec.horizon].float().cpu().numpy()

    def recorded(self, chunk: Float32[np.ndarray, "t q"], given: Prepared) -> Float32[np.ndarray, "t a"]:
        """A normalised chunk in data units, as the robot takes it.

        Raises: UserError if an action is not finite.
        """
        actions = self.normalizer.undo_action(self.place.taken(chunk), self.place.name)
        if not np.isfinite(actions).all():
            names = self.place.learned.action_names
            bad = sorted(set(np.argwhere(~np.isfinite(actions))[:, 1].tolist()))
            where = ", ".join(dimension_label(names, number) for number in bad)
            raise UserError(
                f"the predicted action is not finite in {where}. Nothing was given to the robot. The state "
                "may be far from those of the training data, or a number too large for the model: "
                f"{given.state!r:.200}."
            )
        actions = actions if self.bounds is None else np.clip(actions, *self.bounds)
        convert = self.place.conversion
        return actions if convert is None else convert.record(actions, given.state)
