"""Notes: what a policy is given that it has hardly learned from."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from tutti.data.normalize import ActionStats
from tutti.data.tokenize import Tokenizer
from tutti.serving.observation import wordless
from tutti.types import dimension_label


class Notes:
    """Compares states and texts with those of the training; without `states` texts alone."""

    def __init__(self, states: ActionStats | None, names: tuple[str, ...], tokenizer: Tokenizer) -> None:
        self._states, self._names, self._tokenizer = states, names, tokenizer

    def far(self, state: Float32[np.ndarray, " s"]) -> dict[int, str]:
        """A sentence for each dimension that is far outside of the training data."""
        if self._states is None:
            return {}
        low, high = self._states.min, self._states.max
        return {
            n: f"state: {dimension_label(self._names, n)} is {state[n]:.4g}, far outside of the "
            f"training data ({low[n]:.4g} to {high[n]:.4g})"
            for n in np.flatnonzero(self._states.is_far(state)).tolist()
        }

    def of_text(self, text: str) -> list[str]:
        """A sentence where the text is cut, and where it has no letters."""
        most, tokens = self._tokenizer.max_length, self._tokenizer.length(text)
        cut = f"instruction: {tokens} tokens, the policy reads the first {most}: {text[:80]!r}"
        return [cut] * (tokens > most) + wordless(text)
