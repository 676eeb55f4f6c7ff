"""Tokenizer of instructions: a small byte-level BPE fitted on the training data's, or a tower's own."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from jaxtyping import Bool, Int64
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor

from tutti.errors import UserError
from tutti.storage.reading import parse_json, read_text, shown
from tutti.storage.text_source import TextSource

_PAD = "<pad>"
_MIN_LENGTH = 8
LEAST_MAX, MAX_LENGTH = 64, 2**16
"""The bounds of `max_length`: a sentence of 63 bytes is never cut unless the config says so."""
log = logging.getLogger("tutti.data")
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
    if text.isascii():
        return " ".join(text.lower().split())  # the same, 20 times as fast
    return _NORMALIZER.normalize_str(text.encode(errors="replace").decode())  # half a surrogate pair is "?"


class Tokenizer:
    """Byte-level byte-pair encoding (Sennrich et al., 1508.07909): any text has ids, none is unknown.

    It reads the `normalized_text`. Texts are padded to `text_length` tokens, more only where one of them has
    more, and cut at `max_length`. An unseen sentence has up to a token a byte, since the merges are those of
    the training texts: `max_length` counts bytes, `text_length` the tokens of the training texts. Id 0 is the
    padding. `vocab_size` is what the training reached, at most what was asked for.

    One that belongs to a pre-trained tower (`from_folder`) has the tokens of its tokenizer.json, special ones
    among them, which also a text that is cut ends with; it reads the `normalized_text` between the two parts
    of `around`.
    """

    def __init__(
        self,
        bpe: BPETokenizer,
        text_length: int,
        max_length: int,
        around: tuple[str, str] | None = None,
        end: int = 0,
    ) -> None:
        self._bpe, self._around, self._closing, self._end = bpe, around, 0, end
        self.text_length, self.max_length = text_length, max_length
        if around is not None:
            bpe.no_padding()
            bpe.no_truncation()
            special = bpe.encode("a").special_tokens_mask
            self._closing = next((n for n, one in enumerate(reversed(special)) if not one), len(special))

    @classmethod
    def fit(cls, instructions: Iterable[str], vocab_size: int = 512, text_length: int | None = None) -> Self:
        """Learns the merges from the distinct `instructions`; their order and number do not matter.

        A given `text_length` is `max_length` too. Where it is None, `text_length` is 1.5 times the tokens of
        the longest instruction and `max_length` 1.5 times its bytes, at least `LEAST_MAX`; multiples of 8.
        An instruction with over `LEAST_MAX` tokens and over 4 times the median is no measure for the others:
        then the longest is that at the 99 % quantile.

        Raises UserError where `vocab_size` is under 257 (256 bytes and the padding), or two instructions do
        not differ within a given `text_length`.
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
        ids = dict(zip(texts, cls(bpe, 1, 1)._encoded(texts), strict=True))
        lengths = sorted(map(len, ids.values())) or [0]
        longest, median = lengths[-1], lengths[len(lengths) // 2]
        usual = longest
        if longest > max(LEAST_MAX, 4 * median):
            usual = lengths[int(0.99 * (len(lengths) - 1))]
        room = max((len(text.encode()) + 1 for text in texts if len(ids[text]) <= usual), default=0)
        max_length = text_length or max(LEAST_MAX, _with_room(room))
        met: dict[tuple[int, ...], str] = {}
        for text in (text for text in texts if longest > max_length):
            if (other := met.setdefault(tuple(ids[text][:max_length]), text)) != text:
                if text_length is None:
                    max_length = longest
                    break
                raise UserError(
                    f"data.text_length is {text_length}, and within so many tokens two instructions are the "
                    f"same: {other[:120]!r} and {text[:120]!r}.\n"
                    f"  cure: raise data.text_length (the longest has {longest} tokens), or leave it 'auto'."
                )
        text_length = text_length or max(_MIN_LENGTH, _with_room(usual))
        if usual < longest:
            log.info(
                f"text: the longest of {len(texts):,} instructions has {longest} tokens, the median "
                f"{median}; batches are padded to {text_length}, to more only where a text needs it"
            )
        return cls(bpe, text_length, max_length)

    @classmethod
    def of(
        cls,
        instructions: Iterable[str],
        vocab_size: int,
        text_length: int | Literal["auto"],
        source: TextSource | None = None,
    ) -> Self:
        """That of `source`, where there is one, else one that is fitted. Raises: UserError as these do."""
        length = None if text_length == "auto" else text_length
        if source is None:
            return cls.fit(instructions, vocab_size, length)
        given = {name: getattr(source, name) for name in ("around", "longest", "end", "rows")}
        return cls.from_folder(source.folder, instructions, length, **given)

    @classmethod
    def from_folder(
        cls,
        folder: Path,
        instructions: Iterable[str],
        text_length: int | None = None,
        *,
        around: tuple[str, str] = ("", ""),
        longest: int | None = None,
        end: int = 0,
        rows: int | None = None,
    ) -> Self:
        """The tokenizer.json of a pre-trained tower, which reads at most `longest` tokens and embeds `rows`.

        `text_length` and `max_length` are chosen for the `instructions` as `fit` does.

        Raises: UserError if there is none, it cannot be read, or cuts two instructions to the same.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise UserError(
                f"{path} is not there.\n  expected: the tower's tokenizer, as the tokenizers library saves it"
                "\n  cure: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER), by transformers"
            )
        made = cls(_foreign(read_text(path), str(path), rows), MAX_LENGTH, MAX_LENGTH, around, end)
        texts = sorted(set(map(normalized_text, instructions)))
        ids = dict(zip(texts, made._encoded(texts), strict=True))
        most = max(map(len, ids.values()), default=0)
        room = max((len(text.encode()) + len("".join(around).encode()) for text in texts), default=0) + 4
        limit = min(MAX_LENGTH if longest is None else longest, text_length or MAX_LENGTH)
        made.max_length = min(limit, text_length or max(LEAST_MAX, _with_room(max(room, most))))
        made.text_length = min(made.max_length, text_length or max(_MIN_LENGTH, _with_room(most)))
        cut = dict[tuple[int, ...], str]()
        for text in texts if most > made.max_length else ():
            if (other := cut.setdefault(tuple(made._cut(ids[text], made.max_length)), text)) != text:
                raise UserError(
                    f"model.language reads {made.max_length} tokens, and within so many two instructions are "
                    f"the same: {other[:120]!r} and {text[:120]!r}.\n  cure: raise data.text_length where it "
                    "is lower, shorten them, or choose a tower that reads more"
                )
        return made

    @property
    def vocab_size(self) -> int:
        """The number of distinct ids, padding included; a tower's own may leave some out."""
        if self._around is None:
            return self._bpe.get_vocab_size()
        return max(self._bpe.get_vocab().values()) + 1

    def unknown_share(self, texts: Sequence[str]) -> float:
        """The share of the tokens of these texts that stand for what the tokenizer does not know."""
        model = json.loads(self._bpe.to_str())["model"]
        named = model.get("unk_token")
        unknown = model.get("unk_id") if named is None else self._bpe.token_to_id(named)
        ids = [token for row in self._encoded(texts) for token in row]
        return ids.count(unknown) / max(1, len(ids)) if unknown is not None else 0.0

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens in the order of their ids."""
        ids = self._bpe.get_vocab()
        return tuple(sorted(ids, key=lambda token: ids[token]))

    def length(self, text: str) -> int:
        """The number of tokens of a text, before it is cut."""
        return len(self._encoded([text])[0])

    def encode(self, texts: Sequence[str]) -> tuple[Int64[Tensor, "n l"], Bool[Tensor, "n l"]]:
        """Ids, 0 where padded, and the mask of what is text; "" is masked altogether.

        l is `text_length`, or the next multiple of 8 that holds the longest text, at most `max_length`: a
        text with more tokens is cut at the end.
        """
        rows = self._encoded(texts)
        longest = max(map(len, rows), default=0)
        width = min(max(self.text_length, 8 * math.ceil(longest / 8)), self.max_length)
        return _filled([self._cut(tokens, width) for tokens in rows], width)

    def encode_answers(self, texts: Sequence[str]) -> tuple[Int64[Tensor, "n k"], Bool[Tensor, "n k"]]:
        """Ids of what is written, and the mask of what there is: the tokens of each text without special
        ones, and the one that ends it, the padding's where Tutti made the tokenizer. "" is masked altogether.

        k is a multiple of 8 that holds the longest; a text with over `max_length` tokens is cut, without end.
        """
        known = list(map(normalized_text, texts))
        rows = self._bpe.encode_batch_fast(known, add_special_tokens=False)
        each = [
            [*row.ids, self._end][: self.max_length] if t else [] for t, row in zip(known, rows, strict=True)
        ]
        width = max(8, 8 * math.ceil(max(map(len, each), default=0) / 8))
        return _filled(each, width)

    def to_json(self) -> str:
        """Everything, as JSON text; `from_json` gives an equal tokenizer back."""
        return json.dumps(
            {
                "text_length": self.text_length,
                "max_length": self.max_length,
                "bpe": json.loads(self._bpe.to_str()),
                **({"around": self._around} if self._around is not None else {}),
                **({"end": self._end} if self._end else {}),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`. But for a tower's own only what `fit` makes is taken: the library has
        other parts, which could allocate or search without end.

        Raises: UserError if it is anything else.
        """
        data = parse_json(text, "tokenizer", finite=True)
        bpe, length, most = data.get("bpe"), data.get("text_length"), data.get("max_length")
        if not (
            isinstance(bpe, dict)
            and (type(length) is int and type(most) is int)  # no bool
            and 1 <= length <= most <= MAX_LENGTH
        ):
            raise UserError(
                f"not a tokenizer of Tutti: text_length is {shown(length)}, max_length {shown(most)}."
            )
        if "around" in data:
            around, end = data["around"], data.get("end", 0)
            if not (isinstance(around, list) and [*map(type, around)] == [str, str]):
                raise UserError(f"not a tokenizer of Tutti: around is {shown(around)}.")
            if type(end) is not int or end < 0:
                raise UserError(f"not a tokenizer of Tutti: end is {shown(end)}.")
            return cls(_foreign(json.dumps(bpe), "tokenizer"), length, most, (around[0], around[1]), end)
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
        made = _parsed(json.dumps(bpe), "not a tokenizer")
        ids = made.get_vocab().values()
        if max(ids, default=0) >= len(ids):
            raise UserError(f"not a tokenizer of Tutti: ids up to {max(ids)} for {len(ids)} tokens.")
        return cls(made, length, most)

    def _encoded(self, texts: Iterable[str]) -> list[list[int]]:
        known = list(map(normalized_text, texts))
        before, behind = self._around or ("", "")
        rows = self._bpe.encode_batch_fast([f"{before}{text}{behind}" for text in known])
        return [row.ids if text else [] for text, row in zip(known, rows, strict=True)]

    def _cut(self, tokens: list[int], width: int) -> list[int]:
        """At most `width` tokens, with the special ones at the end."""
        if len(tokens) <= width:
            return tokens
        kept = max(0, width - self._closing)
        return [*tokens[:kept], *tokens[len(tokens) - (width - kept) :]]


def _filled(rows: Sequence[list[int]], width: int) -> tuple[Int64[Tensor, "n l"], Bool[Tensor, "n l"]]:
    """Rows of tokens with 0 behind them, and the mask of what they are."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width).bool()
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64), True
    return ids, mask


def _foreign(text: str, where: str, rows: int | None = None) -> BPETokenizer:
    """A tokenizer of the library, without special tokens that no text has and no row is for, as PaliGemma's
    <image> in a pi0. Raises: UserError if it is none, or of a model that is not known."""
    made = _parsed(text, f"{where}: not a tokenizer of the tokenizers library")
    if (kind := type(made.model).__name__) not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise UserError(f"{where}: its model is {kind}; expected BPE, WordPiece, Unigram or WordLevel.")
    if not made.get_vocab_size():
        raise UserError(f"{where}: it has no tokens.")
    if rows is not None and max(made.get_vocab().values()) >= rows:
        said, end = json.loads(made.to_str()), max(rows, max(made.encode("a").ids) + 1)
        said["added_tokens"] = [one for one in said["added_tokens"] if not one["special"] or one["id"] < end]
        return _parsed(json.dumps(said), where)
    return made


def _parsed(text: str, problem: str) -> BPETokenizer:
    try:
        return BPETokenizer.from_str(text)
    except BaseException as error:  # the library raises a bare Exception, and its panics are none at all
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{problem} ({shown(str(error), 200, quoted=False)}).") from error


def _with_room(length: int) -> int:
    """1.5 times as long, a multiple of 8: for wordings that the training texts do not have."""
    return 8 * math.ceil(1.5 * length / 8)


def _type(part: Any) -> str | None:
    return part.get("type") if isinstance(part, dict) else None
