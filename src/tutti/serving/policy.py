"""Policy: a checkpoint that predicts a chunk of actions from images, state and instruction; its export."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Float32

from tutti.chunks import QUEUE, ChunksConfig, Continuation
from tutti.data.conventions.served import Served
from tutti.data.normalize import Normalizer
from tutti.data.tokenize import Tokenizer
from tutti.errors import near_miss
from tutti.models.vla import VLA
from tutti.plugin import Trust
from tutti.serving.actor import Actor
from tutti.serving.contents import filled_model, read_model, read_normalizer, read_served, read_tokenizer
from tutti.serving.front_door import FrontDoor, Given
from tutti.serving.notes import Notes
from tutti.serving.observation import Pictures, State, Text, sentence
from tutti.serving.prediction.chunks import ChunkPrediction, Prepared
from tutti.serving.prediction.memory import Memory
from tutti.serving.prediction.place import Place
from tutti.serving.prediction.texts import EncodedTexts
from tutti.storage.checkpoint import find_checkpoint, listed
from tutti.storage.manifest import Weights
from tutti.types import History, UserError


class Policy:
    """Predicts a chunk of actions. A pure function of its arguments, without noise.

    Several threads may call one policy at the same time; each gets the bits that it would get alone. Only
    `act` and `observe` have a history, of one robot; `actor` and `for_another_robot` give each robot one of
    its own. If the training had a history (`remembers`), a prediction looks at what was observed before.
    """

    def __init__(
        self,
        model: VLA,
        normalizer: Normalizer,
        tokenizer: Tokenizer,
        *,
        embodiment: str | None = None,
        clip: bool = True,
        device: torch.device | str = "cpu",
        warn: bool = True,
        served: Served | None = None,
        convention: int | Literal["learned"] = 0,
    ) -> None:
        """`clip` keeps actions inside the smallest and largest value that the training data has per
        dimension, as they are learned. `warn`: what `check` would note is given as a Python warning too,
        once.

        `embodiment` is the robot of all calls that name none; it may be left out. Of several robots each call
        must name one then, and `spec` is that of all together. Raises UserError for a name that is none.

        `served` are the conventions of the training's sources. States are taken, and actions given, in
        those of the source number `convention`, or "learned", as the model has them; `spec` has their names.
        A robot that this source is not of goes by its own first one.
        """
        self.model = model.eval().to(device)
        self.normalizer = normalizer
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self._served = served
        self._convention: int | Literal["learned"] = convention
        self._clip, self._warns = clip, warn
        self._lock = Lock()  # of what has been noted, and of the robots
        self._bound: dict[str, Self] = {}
        self.embodiment, self.spec = embodiment, model.spec
        if embodiment is None and len(model.spec.embodiments) == 1:
            embodiment = model.spec.embodiments[0]
        if embodiment is not None:
            self._bind(embodiment)

    def _bind(self, name: str) -> None:
        """Makes it the policy of this robot."""
        self.embodiment = self._check_name(name)
        reads = self.model.fusion.reads_state
        self._place = Place.of(self.model.spec, name, self._served, self._convention, reads_state=reads)
        self.learned, self.spec = self._place.learned, self._place.spec
        self.normalizer.check(name, self.learned.state_dim, self.learned.action_dim)
        both = self.normalizer.stats[name]
        states = both.state if self.needs_state else None
        self._notes = Notes(states, self.learned.state_names, self.tokenizer)
        low, high = both.action.min.astype(np.float32), both.action.max.astype(np.float32)
        self.prediction = ChunkPrediction(
            model=self.model,
            normalizer=self.normalizer,
            place=self._place,
            texts=EncodedTexts(self.model, self.tokenizer, self._notes if self._warns else None),
            bounds=(low, high) if self._clip else None,
        )
        self._actor: Actor | None = None
        self._memory = self._new_memory()
        self._noted: set[int] | None = set() if self._warns else None

    def _check_name(self, name: str | None) -> str:
        known = [one for one in self.model.spec.embodiments if self.model.spec.alone(one).action_dim]
        if name is None or name not in known:
            cure = "\n  cure: name the robot, embodiment=NAME or --robot NAME"
            near = cure if name is None else near_miss(str(name), known)
            raise UserError(f"embodiment: expected one of {', '.join(known)}, got {name!r:.80}.{near}")
        return name

    def robot(self, embodiment: str | None = None) -> Self:
        """The policy of one of several robots, with the same weights; of its own, if none is named.

        Raises: UserError for a name that the training data do not have with actions, or for none of several.
        """
        name = self._check_name(embodiment or self.embodiment)
        if name == self.embodiment:
            return self
        with self._lock:
            if name not in self._bound:
                other = copy.copy(self)
                other._bound = {}
                other._bind(name)
                self._bound[name] = other
            return self._bound[name]

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
        warn: bool = True,
        convention: int | Literal["learned"] = 0,
    ) -> Self:
        """From a checkpoint folder, or from a run's folder, whose newest checkpoint is taken.

        Reads model.safetensors ("raw") or ema.safetensors ("ema"; the raw weights where training kept no
        average), or the same out of shards/; spec.json, normalizer.json, tokenizer.json and config.yaml, and
        conventions.json where there is one. Each has the checksum that state.json, or export.json, lists.
        `convention`: the number of the source there that the robot is like, or "learned". `trust_code`: a
        class of the user's own that config.yaml names is imported.

        Raises UserError: a file is missing, damaged or does not fit the others, or a number is not finite.
        """
        folder = listed(find_checkpoint(Path(checkpoint)))
        config, spec = read_model(folder, weights, trust_code)
        normalizer, tokenizer = read_normalizer(folder, spec), read_tokenizer(folder, spec)
        model = filled_model(folder, config, spec, weights)
        return cls(
            *(model, normalizer, tokenizer),
            embodiment=embodiment,
            clip=clip,
            device=device,
            warn=warn,
            served=read_served(folder, spec),
            convention=convention,
        )

    def predict(
        self,
        images: Pictures,
        state: State,
        instruction: Text,
        use_images: bool = True,
        *,
        continuing: Continuation | None = None,
        time: float | None = None,
        history: History | None = None,
        embodiment: str | None = None,
    ) -> Float32[np.ndarray, "t a"]:
        """The next `horizon` actions in data units, in the conventions of the robot.

        `images` maps each view to its picture: {"front": ..., "wrist": ...}, by the names of `spec.views` or
        their last parts. A picture is an array, a tensor or a PIL image, (height, width, 3) or (3, height,
        width) (3 x w x 3 counts as height first), uint8, or floats from 0 to 1; each view may have another
        size, and is resized as in training. A policy of one view takes the bare picture too.
        `use_images=False` removes all vision tokens; `images` may then be None.

        `state` is in data units: an array in the order of the training data, or a number for each name of
        `spec.state_names`. None where the policy has no state, or not `needs_state`.

        `continuing`: the chunk goes on from the one before (real-time chunking; the flow decoder alone).

        A policy that `remembers` needs the `time`, seconds since the start of the episode: it looks at what
        this robot observed at `spec.history` steps before, and masks what it was never given. Or it is given
        what `observe` gave at this moment, as `history`.

        `embodiment` names one of several robots: everything is then that of `robot(embodiment)`.

        Raises UserError where a name is wrong or missing, an argument has another shape or type than the
        model was trained on, or an action is not finite.
        """
        if (own := self.robot(embodiment)) is not self:
            given: dict[str, Any] = {"continuing": continuing, "time": time, "history": history}
            return own.predict(images, state, instruction, use_images, **given)
        prepared = self._prepare(images, state, instruction, use_images)
        if self.remembers:
            past = history or self._look(prepared.images, prepared.state, time, use_images)
            prepared = prepared._replace(past=past)
        return self.prediction.recorded(self.prediction([prepared], use_images, continuing)[0], prepared)

    def predict_many(
        self,
        observations: Sequence[tuple[Pictures, State, Text]],
        histories: Sequence[History] = (),
        use_images: bool | Sequence[bool] = True,
    ) -> list[Float32[np.ndarray, "t a"] | UserError]:
        """`predict` of several robots in one batch: for each its chunk, or why it has none. `histories` are
        what `observe` gave for each, where the policy `remembers`; `use_images` says it for all, or each.

        An observation that cannot be used takes nothing from the others. The sums of a batch are added up in
        another order than those of one: actions differ in their last bits, by some 2e-7 of their range.
        """
        self.robot()
        if self.remembers and len(histories) != len(observations):
            raise self._memory.without_time()
        looks = np.broadcast_to(use_images, len(observations)).tolist()
        pasts = histories or [None] * len(observations)
        found, usable = dict[int, Float32[np.ndarray, "t a"] | UserError](), dict[int, Prepared]()
        for place, (one, past) in enumerate(zip(observations, pasts, strict=True)):
            try:
                usable[place] = self._prepare(*one, looks[place])._replace(past=past)
            except UserError as error:
                found[place] = error
        chunks = self.prediction([*usable.values()], [looks[place] for place in usable]) if usable else ()
        for (place, one), chunk in zip(usable.items(), chunks, strict=True):
            try:
                found[place] = self.prediction.recorded(chunk, one)
            except UserError as error:
                found[place] = error
        return [found[place] for place in range(len(observations))]

    @property
    def needs_state(self) -> bool:
        """False where the state changes nothing, so that None may stand for it."""
        return self.robot()._place.needs_state

    @property
    def remembers(self) -> bool:
        """Whether observations before the present count: those at `spec.history` steps from it."""
        return len(self.spec.history) > 1

    def observe(self, images: Pictures, state: State, time: float, use_images: bool = True) -> History | None:
        """Remembers an observation of `time`, seconds since the start of the episode; `predict` remembers its
        own. Gives what a prediction at this moment looks back at, None if the policy does not remember.

        Raises: UserError as `predict`, or where the time lies before that of the last observation.
        """
        if not self.remembers:
            return None
        place = self.robot()._place
        pictures = place.images(images, use_images).to(self.device)
        return self._look(pictures, place.felt(state), time, use_images)

    def _look(
        self, images: torch.Tensor, state: Float32[np.ndarray, " s"], time: float | None, use_images: bool
    ) -> History:
        normalised = self._place.state(self.normalizer.apply_state(state, self.embodiment))
        return self._memory.look(images[0] if use_images else None, normalised, time)

    def for_another_robot(self) -> Self:
        """The same policy with the same weights, and a memory of its own."""
        other = copy.copy(self)
        other._actor, other._memory, other._bound = None, self._new_memory(), {}
        return other

    def _new_memory(self) -> Memory:
        shown = self.robot()._place.shown
        return Memory(self.model.spec, self.spec.history, self.spec.fps, self.device, shown)

    def _prepare(
        self, images: Pictures, state: State, instruction: Text, use_images: bool = True
    ) -> Prepared:
        """Raises: UserError as `predict`, for what is given."""
        place = self.robot()._place
        resized, vector = place.images(images, use_images).to(self.device), place.felt(state)
        if self._noted is not None:
            self._warn(vector)
        return Prepared(resized, vector, sentence(instruction))

    def act(self, observation: Given) -> Float32[np.ndarray, " a"]:
        """The action of this control step, as `actor()` gives it. Raises: UserError as `predict`."""
        if self._actor is None:
            self._actor = self.actor()
        return self._actor.act(observation)

    def reset(self) -> None:
        """The next `act`, `observe` or `predict` begins an episode."""
        self._actor = None
        for one in (self, *self._bound.values()) if self.embodiment else self._bound.values():
            one._memory.reset()

    def actor(
        self,
        actions_per_query: int | None = None,
        chunks: ChunksConfig = QUEUE,
        *,
        background: bool = False,
        front_door: FrontDoor | None = None,
    ) -> Actor:
        """The policy as one robot calls it. `actions_per_query` of each chunk are executed (default: half of
        the horizon), as `chunks` says; with `background` the robot goes on while a chunk is computed.
        `front_door` finds pictures, state and instruction in an observation.

        Raises: UserError if these do not fit one another, or the horizon.
        """
        door = front_door or FrontDoor(self.robot().spec, needs_state=self.needs_state)
        steps = max(1, self.spec.horizon // 2) if actions_per_query is None else actions_per_query
        return Actor(self.for_another_robot(), door, steps, chunks, background)

    __call__ = predict

    def check(self, images: Pictures, state: State, instruction: Text, use_images: bool = True) -> list[str]:
        """What `predict` would take, but the policy has hardly learned from: a sentence for each.

        A dimension of the state beyond the smallest or largest value of the training data by more than half
        of the range between them (half a unit where it never moved); an instruction that is cut, since it has
        more tokens than the tokenizer's `max_length`, or that has no letters. Nothing is predicted: a server
        sends these notes beside the actions.

        Raises: UserError as `predict`.
        """
        self.robot()._place.images(images, use_images)
        return self.notes(state, instruction)

    def notes(self, state: State, instruction: Text) -> list[str]:
        """`check` of all but the pictures."""
        vector, text = self.robot()._place.felt(state), sentence(instruction)
        return [*self._notes.far(vector).values(), *self._notes.of_text(text)]

    def _warn(self, state: Float32[np.ndarray, " s"]) -> None:
        """Warns of each dimension once."""
        far = self._notes.far(state)
        with self._lock:
            assert self._noted is not None
            new = far.keys() - self._noted
            self._noted |= new
        for number in sorted(new):
            warnings.warn(far[number], stacklevel=4)
