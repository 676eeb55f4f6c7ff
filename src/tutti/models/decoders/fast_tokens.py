"""FAST tokens: a chunk of actions as a short sequence of integers, by cosine transform, rounding and BPE."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tutti.models.decoders import bpe
from tutti.models.layers import readable
from tutti.types import UserError

FIT_NUMBERS = 500_000
"""Numbers that pairs are learned from at most, in chunks evenly spread; the alphabet is learned from all."""
MOST_CLAMPED = 0.005
"""Share of the coefficients that the alphabet may lack."""
ALPHABET_SHARE = 0.9
"""Share of the vocabulary that may be symbols."""
PAD = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenReport:
    """How short and how exact the tokens of some chunks are.

    `ratio` is numbers per token: t * a over the mean number of tokens. `clamped` is the share of coefficients
    outside the alphabet, `rounding_l1` the mean |a - decode(encode(a))|, in normalised units.
    """

    tokens_per_chunk: float
    longest: int
    ratio: float
    clamped: float
    rounding_l1: float


class ChunkTokens(nn.Module):
    """Chunk to tokens and back (FAST, 2501.09747).

        C = D x,   D_kt = sqrt((2 - [k = 0]) / T) cos(pi (t + 1/2) k / T),   in each action dimension
        q = clamp(round(scale C), alphabet),   tokens = BPE(q)

    q is written frequency by frequency, low ones first, with all dimensions of a frequency together.

    D is orthonormal, so what rounding does to a dimension of the chunk has a Euclidean norm of at most
    sqrt(T) / (2 scale), and none of its steps is off by more than that.

    Everything that is learned is in buffers: `pairs` and `spelling` (what each token stands for), the
    alphabet's lowest integer, how many symbols and tokens there are, and the longest sequence of the chunks
    that pairs were learned from. Before `fit` every token is one symbol, with the alphabet around 0.

    Differs: FAST writes the integers as characters and trains the BPE of a text library; here it is our own,
    on the integers themselves. An integer that the alphabet lacks becomes the nearest that it has.
    """

    def __init__(self, horizon: int, action_dim: int, vocabulary_size: int, scale: float) -> None:
        super().__init__()
        self.horizon, self.action_dim, self.scale = horizon, action_dim, scale
        self.num_numbers = horizon * action_dim
        self.vocabulary_size = vocabulary_size
        self.cosines: Tensor
        self.pairs: Tensor
        self.spelling: Tensor
        self.lowest: Tensor
        self.num_symbols: Tensor
        self.num_tokens: Tensor
        self.longest: Tensor
        spelling = torch.full((vocabulary_size, self.num_numbers), PAD, dtype=torch.int64)
        spelling[:, 0] = torch.arange(vocabulary_size)
        self.register_buffer("cosines", cosine_matrix(horizon), persistent=False)
        self.register_buffer("pairs", torch.full((vocabulary_size, 2), -1, dtype=torch.int64))
        self.register_buffer("spelling", spelling)
        for name, value in (
            ("lowest", -(vocabulary_size // 2)),
            ("num_symbols", vocabulary_size),
            ("num_tokens", vocabulary_size),
            ("longest", self.num_numbers),
        ):
            self.register_buffer(name, torch.full((), value, dtype=torch.int64))

    @torch.no_grad()
    def fit(self, actions: Float[Tensor, "n t a"]) -> None:
        """Learns the alphabet and the pairs. The same chunks give the same tokens.

        Raises: UserError if the vocabulary cannot hold the integers that occur.
        """
        integers = self._integers(actions.to(self.cosines))
        lowest, count = self._alphabet(integers)
        self.lowest.fill_(lowest)
        self.num_symbols.fill_(count)
        some = self.spread(self._symbols(integers))
        rows = torch.arange(len(some), device=some.device).repeat_interleave(self.num_numbers)
        learned = bpe.learn(some.flatten(), rows, count, self.vocabulary_size)
        self.pairs.fill_(-1)
        self.pairs[count : count + len(learned)] = learned.to(self.pairs.device)
        self.num_tokens.fill_(count + len(learned))
        self.spelling.copy_(bpe.spell(self.pairs.cpu(), count + len(learned), self.num_numbers))
        self.longest.fill_(int(self._encode_symbols(some)[1].max()))

    def spread(self, chunks: Tensor) -> Tensor:
        """Chunks evenly spread over the given ones, with FIT_NUMBERS numbers at most."""
        return chunks[:: -(-chunks.numel() // FIT_NUMBERS)]

    def encode(self, actions: Float[Tensor, "b t a"]) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
        """Tokens of each chunk, padded with -1, and their numbers. Padded to the longest of them; where to
        look for it would make the host wait (on a GPU), to as many as a chunk has numbers."""
        return self._encode_symbols(self._symbols(self._integers(actions)))

    def decode(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b t a"]:
        """The chunk that the tokens spell; -1 spells nothing.

        Too few numbers are filled up with zeros, which are the highest frequencies; too many are cut off.
        """
        spelled = torch.where(tokens[..., None] == PAD, PAD, self.spelling[tokens.clamp(min=0)])
        lengths = (spelled != PAD).sum(-1)
        starts = lengths.cumsum(1) - lengths
        places = starts[..., None] + torch.arange(self.num_numbers, device=tokens.device)
        nowhere = (spelled == PAD) | (places >= self.num_numbers)
        places = torch.where(nowhere, self.num_numbers, places)
        values = (spelled + self.lowest).to(self.cosines.dtype) / self.scale
        coefficients = values.new_zeros(len(tokens), self.num_numbers + 1)
        coefficients.scatter_(1, places.flatten(1), values.flatten(1))
        coefficients = coefficients[:, :-1].unflatten(1, (self.horizon, self.action_dim))
        return _exact_product(self.cosines.mT, coefficients)

    def lengths(self) -> Int[Tensor, " v"]:
        """How many numbers each token spells; unused tokens spell more than a chunk has."""
        spelled = (self.spelling != PAD).sum(-1)
        return torch.where(spelled == 0, self.num_numbers + 1, spelled)

    @torch.no_grad()
    def report(self, actions: Float[Tensor, "n t a"]) -> TokenReport:
        """What encoding these chunks gains and loses."""
        integers = self._integers(actions.to(self.cosines))
        tokens, lengths = self.encode(actions.to(self.cosines))
        clamped = (self._symbols(integers) + self.lowest != integers).double().mean()
        mean = float(lengths.double().mean())
        return TokenReport(
            tokens_per_chunk=mean,
            longest=int(lengths.max()),
            ratio=self.num_numbers / mean,
            clamped=float(clamped),
            rounding_l1=float((self.decode(tokens) - actions).abs().mean()),
        )

    def _integers(self, actions: Float[Tensor, "b t a"]) -> Int[Tensor, "b n"]:
        return (self.scale * _exact_product(self.cosines, actions)).round().long().flatten(1)

    def _symbols(self, integers: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        # Against tensors, not numbers read from them, so that a device is not waited for.
        return (integers - self.lowest).clamp(min=0).minimum(self.num_symbols - 1)

    def _encode_symbols(self, symbols: Int[Tensor, "b n"]) -> tuple[Int[Tensor, "b m"], Int[Tensor, " b"]]:
        if not readable(symbols):
            return bpe.encode_waiting_for_nothing(symbols, self.pairs)
        b = len(symbols)
        rows = torch.arange(b, device=symbols.device).repeat_interleave(self.num_numbers)
        tokens, rows = bpe.encode(symbols.flatten(), rows, b, self.pairs)
        lengths = torch.bincount(rows, minlength=b)
        first = lengths.cumsum(0) - lengths
        padded = tokens.new_full((b, int(lengths.max())), PAD)
        padded[rows, torch.arange(len(rows), device=rows.device) - first[rows]] = tokens
        return padded, lengths

    def _alphabet(self, integers: Int[Tensor, "n m"]) -> tuple[int, int]:
        """The lowest integer, and how many from it on: all that occur, or the stretch with most of them."""
        lowest, highest = int(integers.min()), int(integers.max())
        most = max(1, int(ALPHABET_SHARE * self.vocabulary_size))
        if highest - lowest < most:
            return lowest, highest - lowest + 1
        counts = torch.bincount((integers - lowest).flatten()).double()
        total = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        inside = total[most:] - total[:-most]
        start = int(inside.argmax())
        outside = 1 - float(inside[start] / total[-1])
        if outside > MOST_CLAMPED:
            raise UserError(
                f"model.action: with scale {self.scale:g} the chunks' cosine coefficients are integers from "
                f"{lowest} to {highest}, but vocabulary_size {self.vocabulary_size} has room for {most} of "
                f"them: {100 * outside:.1f} % would change. Set model.action.vocabulary_size to at least "
                f"{math.ceil((highest - lowest + 1) / ALPHABET_SHARE)}, or model.action.scale lower."
            )
        return lowest + start, most


def _exact_product(matrix: Float[Tensor, "t t"], chunk: Float[Tensor, "b t a"]) -> Float[Tensor, "b t a"]:
    """matrix @ chunk in the matrix's own precision, whatever is cast automatically around it."""
    kind = chunk.device.type
    with nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False):
        return matrix @ chunk.to(matrix.dtype)


def cosine_matrix(length: int) -> Float[Tensor, "t t"]:
    """The orthonormal DCT-II: row k holds sqrt((2 - [k = 0]) / T) cos(pi (t + 1/2) k / T)."""
    places = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi / length * places[:, None] * (places + 0.5)) * math.sqrt(2 / length)
    matrix[0] /= math.sqrt(2)
    return matrix.float()
