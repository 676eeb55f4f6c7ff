"""Instructions as language tokens, each encoded once: the language encoder sees nothing but the text."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from threading import Lock

import torch
from torch.nn import functional as F

from tutti.data.tokenize import Tokenizer
from tutti.models.vla import VLA
from tutti.serving.notes import Notes
from tutti.types import Tokens

MAX_INSTRUCTIONS = 256
"""Encodings kept; the oldest goes first."""


class EncodedTexts:
    """The tokens of each text. Several threads may ask; `notes` are given as a warning, once for each."""

    def __init__(self, model: VLA, tokenizer: Tokenizer, notes: Notes | None) -> None:
        self._model, self._tokenizer, self._notes = model, tokenizer, notes
        self._lock = Lock()
        self._encoded: dict[str, Tokens] = {}

    def __call__(self, texts: Sequence[str]) -> Tokens:
        """As one batch. Where every token is kept a longer text has more: the others are padded to it."""
        each = [self._tokens(text) for text in texts]
        if len(each) == 1:
            return each[0]
        most = max(one.mask.shape[1] for one in each)
        lacking = [most - one.mask.shape[1] for one in each]
        pairs = list(zip(each, lacking, strict=True))
        return Tokens(
            values=torch.cat([F.pad(one.values, (0, 0, 0, more)) for one, more in pairs]),
            mask=torch.cat([F.pad(one.mask, (0, more)) for one, more in pairs]),
        )

    def _tokens(self, text: str) -> Tokens:
        with self._lock:
            if text in self._encoded:
                return self._encoded[text]
        for note in self._notes.of_text(text) if self._notes else ():
            warnings.warn(note, stacklevel=6)
        device = next(self._model.parameters()).device
        ids, mask = self._tokenizer.encode([text])
        encoded = self._model.language(ids.to(device), mask.to(device))
        with self._lock:  # another thread may have made the same meanwhile: to the same bits
            self._encoded[text] = encoded
            while len(self._encoded) > MAX_INSTRUCTIONS:
                del self._encoded[next(iter(self._encoded))]
        return encoded
