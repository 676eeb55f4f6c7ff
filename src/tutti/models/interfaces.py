"""Abstract base classes of the parts of a model: vision encoder, language encoder, fusion, action decoder.

A part is replaced by writing a subclass of one of these and a config with `build()`; the
assembly (`vla.py`) and every loss term only ever use what is written here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tutti.errors import UserError
from tutti.models.held import held
from tutti.types import Batch, Features, Movable, Robots, Tokens

RobotKind = Literal["projection", "prompt"]
"""How a model is told which robot a row is of."""


class VisionEncoder(nn.Module, ABC):
    """Pictures to tokens. `width` is d of its tokens; `tokens_per_view` their number in each view."""

    width: int
    tokens_per_view: int

    @abstractmethod
    def forward(self, images: Float[Tensor, "b v 3 h w"], image_mask: Bool[Tensor, "b v"]) -> Tokens:
        """Images in [-1, 1] to (b, v * tokens_per_view, d); an absent view's tokens are masked."""

    if TYPE_CHECKING:
        __call__ = forward


class LanguageEncoder(nn.Module, ABC):
    """Instruction to tokens. `num_tokens` is the number it gives, `width` their d."""

    width: int
    num_tokens: int

    @abstractmethod
    def forward(self, text: Int[Tensor, "b l"], text_mask: Bool[Tensor, "b l"]) -> Tokens:
        """Token ids to (b, num_tokens, d); a sample with no text at all has all its tokens masked."""

    def held(self, boundaries: Collection[str]) -> AbstractContextManager[None]:
        """What it writes inside sends no gradient to its parameters, if "language" is among `boundaries`."""
        return held(*([self] if "language" in boundaries else []))

    def require_writer(self, key: str) -> None:
        """Raises: UserError if it cannot `write`, naming the `key` that asks for it."""
        raise self._cannot_write(key)

    def _cannot_write(self, key: str) -> UserError:
        return UserError(
            f"{key} lets the language encoder write, which {type(self).__name__} does not.\n  expected: "
            "model.language.kind=transformer, or a pre-trained decoder (Llama, Gemma, Qwen, Mistral, SmolLM3)"
        )

    def write(
        self,
        before: Tokens,
        text: Int[Tensor, "b l"],
        text_mask: Bool[Tensor, "b l"],
        answer: Int[Tensor, "b k"],
        answer_mask: Bool[Tensor, "b k"],
    ) -> Float[Tensor, "b k c"]:
        """The logits of each token of the answer, of c tokens that there are, from the tokens `before` (of
        its width, the first of them in every row), the text, and the answer up to the token before it.

        Raises: UserError if it cannot.
        """
        raise self._cannot_write("write")

    if TYPE_CHECKING:
        __call__ = forward


@dataclass(frozen=True, slots=True, kw_only=True)
class Past(Movable):
    """Earlier moments, the earliest first: the vision tokens of one behind those of the other (n = m times
    those of the present), and their states."""

    vision: Tokens
    state: Float[Tensor, "b m s"]
    state_mask: Bool[Tensor, "b m"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused(Movable):
    """What a fusion gives: the readout and the fused vision tokens, in the order they came in; a VLM also its
    text tokens, by block vision and language behind it (`Features.layers`), and the state that it read."""

    readout: Float[Tensor, "b d"]
    vision: Tokens
    language: Tokens | None = None
    layers: tuple[Tokens, ...] = ()
    state: Float[Tensor, "b s"] | None = None


class Fusion(nn.Module, ABC):
    """Vision, language and state become one. `width` is the d of what it gives."""

    width: int

    @property
    def reads_state(self) -> bool:
        """False: whatever a state holds, it changes nothing."""
        return True

    @abstractmethod
    def forward(
        self,
        vision: Tokens,
        language: Tokens,
        state: Float[Tensor, "b s"],
        state_mask: Bool[Tensor, " b"],
        past: Past | None = None,
        *,
        robots: Robots | None = None,
    ) -> Fused:
        """What each has become. Where `state_mask` is False, what the state holds changes nothing, even if it
        is NaN. `past` is what was observed before, where the data have a history; only the present's tokens
        are given back. `robots` tells whose states these are; None: there is one robot."""

    @abstractmethod
    def tell_robots(self, count: int, how: RobotKind) -> None:
        """From now on it is told which of `count` robots a row is of: by a projection of the state of each
        robot's own, or by a learned prompt on the readout."""

    if TYPE_CHECKING:
        __call__ = forward


class ActionDecoder(nn.Module, ABC):
    """Features to a chunk of normalised actions. It knows the error it is trained with.

    It may read anything in `Features`: the readout, or the fused tokens.
    """

    needs_fit: bool = False
    """True if `fit` must be called, once and before training."""

    def fit(self, actions: Float[Tensor, "n t a"], action_mask: Bool[Tensor, "n t a"]) -> None:
        """Learns from normalised training chunks what no gradient can: bin edges, a vocabulary.

        The result is kept in buffers whose shapes follow from the config alone, so that a checkpoint loads
        without a second fit. The same chunks give the same result.
        """

    def separate_robots(self, count: int) -> None:
        """From now on each of `count` robots has projections of actions of its own (`features.robots`).

        Raises: UserError unless the decoder can do it.
        """
        raise UserError(
            f"model.embodiment is projection, but {type(self).__name__} has no projections of each robot's "
            "own: it lacks the method separate_robots. Set model.embodiment to shared or prompt."
        )

    @abstractmethod
    def forward(self, features: Features, batch: Batch) -> Float[Tensor, "b t a"]:
        """The training error of each action of the chunk, unreduced; masked steps hold anything finite."""

    @abstractmethod
    def predict(self, features: Features) -> Float[Tensor, "b t a"]:
        """The predicted chunk, normalised. A function of `features` alone: where it samples, the noise is
        always the same."""

    def predict_continuing(
        self,
        features: Features,
        target: Float[Tensor, "t a"],
        weights: Float[Tensor, " t"],
        guidance: float,
    ) -> Float[Tensor, "b t a"]:
        """The predicted chunk, drawn towards `target` where `weights` are above 0 (real-time chunking).

        Raises: UserError if the decoder has no way to do that.
        """
        raise UserError(
            f"chunks.kind is real_time, which needs the flow decoder; this policy has {type(self).__name__}. "
            "Take chunks.kind=queue with the same delay, or ensemble."
        )

    if TYPE_CHECKING:
        __call__ = forward
