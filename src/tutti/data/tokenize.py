"""Tokenizer of instructions: a small byte-level BPE, fitted on the instructions of the training data."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Self

import torch
from jaxtyping import Bool, Int64
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor

from tutti.errors import UserError
from tutti.storage.reading import parse_json, shown

_PAD = "<pad>"
_MIN_LENGTH = 8
MAX_LENGTH = 2**16
"""Tokens of a padded text at most."""
_BLANKS = r"[\s\x{1C}-\x{1F}\x{200B}\x{2060}\x{FEFF}]+"
"""A run of whatever Unicode calls white space, and of the spaces and marks that have no width."""
_NORMALIZER = normalizers.Sequence(
    [
        normalizers.NFKC(),
        normalizers.Lowercase(),
        normalizers.NFKC(),  # a lower-case letter may be written in two ways
        normalizers.Replace(Regex(_BLANKS), " "),
        normalizers.Strip(),
    ]
)


def normalized_text(text: str) -> str:
    """`text` as the model reads it, and the identity of an instruction: NFKC, lower case, runs of blanks
    (tabs, ends of lines, non-breaking blanks) as one blank, none at the ends.

    Two texts are one instruction exactly where this is equal. Idempotent.
    """
    return _NORMALIZER.normalize_str(text.encode(errors="replace").decode())  # half a surrogate pair is "?"


class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., 1508.07909): any text has ids, none is unknown.

    It reads the `normalized_text`. `text_length` is the padded number of tokens;
    id 0 is the padding. `vocab_size` is what the training reached, at most what was asked for.
    """

    def __init__(self, bpe: BPETokenizer, text_length: int) -> None:
        self._bpe = bpe
        self.text_length = text_length
        self._warned: set[str] = set()

    @classmethod
    def fit(cls, instructions: Iterable[str], vocab_size: int = 512, text_length: int | None = None) -> Self:
        """Learns the merges from the distinct `instructions`; their order and number do not matter.

        Where `text_length` is None it is 1.5 times the longest instruction, a multiple of 8: room for
        wordings that were not seen. Raises UserError where `vocab_size` is under 257 (256 bytes and the
        padding), or an instruction is longer than a given `text_length`.
        """
        if vocab_size < 257:
            raise UserError(f"vocab_size: expected at least 257 (all bytes and padding), found {vocab_size}.")
        texts = sorted(set(map(normalized_text, instructions)))
        bpe = BPETokenizer(models.BPE())
        bpe.normalizer = _NORMALIZER
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        lengths = {text: len(bpe.encode(text).ids) for text in texts}
        longest = max(lengths, key=lambda text: lengths[text], default="")
        if text_length is None:
            text_length = max(_MIN_LENGTH, 8 * math.ceil(1.5 * lengths.get(longest, 0) / 8))
        elif lengths.get(longest, 0) > text_length:
            raise UserError(
                f"text_length is {text_length}, but an instruction of the data has {lengths[longest]} "
                f"tokens: {longest[:120]!r}.\n  cure: raise text_length to that, or leave it 'auto'."
            )
        return cls(bpe, text_length)

    @property
    def vocab_size(self) -> int:
        """The number of distinct ids, padding included."""
        return self._bpe.get_vocab_size()

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""
        ids = self._bpe.get_vocab()
        return tuple(sorted(ids, key=lambda token: ids[token]))

    def length(self, text: str) -> int:
        """The number of tokens of a text, before it is cut."""
        return len(self._bpe.encode(text).ids) if text.strip() else 0

    def encode(
        self, texts: Sequence[str]
    ) -> tuple[Int64[Tensor, "n {self.text_length}"], Bool[Tensor, "n {self.text_length}"]]:
        """Ids (n, text_length), 0 where padded, and the mask of what is text; "" is masked altogether.

        A text with more tokens is cut at the end, with one warning for each such text.
        """
        ids = torch.zeros(len(texts), self.text_length, dtype=torch.int64)
        mask = torch.zeros(len(texts), self.text_length, dtype=torch.bool)
        for row, text in enumerate(texts):
            known = normalized_text(text)
            tokens = self._bpe.encode(known).ids if known else []
            if len(tokens) > self.text_length and text not in self._warned:
                self._warned.add(text)
                warnings.warn(
                    f"This instruction has {len(tokens)} tokens and is cut to text_length = "
                    f"{self.text_length}: {text[:120]!r}",
                    stacklevel=2,
                )
            tokens = tokens[: self.text_length]
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
            mask[row, : len(tokens)] = True
        return ids, mask

    def to_json(self) -> str:
        """Everything, as JSON text; `from_json` gives an equal tokenizer back."""
        return json.dumps({"text_length": self.text_length, "bpe": json.loads(self._bpe.to_str())})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. Only what `fit` makes is taken: the library has other parts, which could
        allocate or search without end.

        Raises: UserError if it is anything else.
        """
        data = parse_json(text, "tokenizer", finite=True)
        bpe, length = data.get("bpe"), data.get("text_length")
        if not isinstance(bpe, dict) or type(length) is not int or not 1 <= length <= MAX_LENGTH:
            raise UserError(f"not a tokenizer of Tutti: text_length is {shown(length)}.")
        model = bpe.get("model")
        parts = {_type(bpe.get(name)) for name in ("normalizer", "pre_tokenizer", "model")}
        unset = [bpe.get(name) for name in ("truncation", "padding", "post_processor", "decoder")]
        if (
            not isinstance(model, dict)
            or parts != {"Sequence", "ByteLevel", "BPE"}
            or bpe["normalizer"] != json.loads(_NORMALIZER.__getstate__())
            or any(one is not None for one in (*unset, model.get("dropout")))
        ):
            raise UserError(f"not a tokenizer of Tutti: it is made of {shown(sorted(map(str, parts)), 200)}.")
        try:
            made = BPETokenizer.from_str(json.dumps(bpe))
            ids = made.get_vocab().values()
        except BaseException as error:  # the library raises a bare Exception, and its panics are none at all
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise UserError(f"not a tokenizer ({shown(str(error), 200, quoted=False)}).") from error
        if max(ids, default=0) >= len(ids):
            raise UserError(f"not a tokenizer of Tutti: ids up to {max(ids)} for {len(ids)} tokens.")
        return cls(made, length)


def _type(part: Any) -> str | None:
    return part.get("type") if isinstance(part, dict) else None
