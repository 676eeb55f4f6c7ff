"""FAST tokens: a chunk of actions as a short sequence of integers, by cosine transform, rounding and BPE.

The byte-pair encoding works on the integers themselves, many sequences at once: a row each, padded with -1.
On a device nothing is read back, which a text library's would need. Nothing depends on an order of hashing.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from tutti.masks import readable
from tutti.precision import exact_product
from tutti.types import UserError

FIT_NUMBERS = 500_000
"""Numbers that pairs are learned from at most, in chunks evenly spread; the alphabet is learned from all."""
MOST_CLAMPED = 0.005
"""Share of the coefficients that the alphabet may lack."""
ALPHABET_SHARE = 0.9
"""Share of the vocabulary that may be symbols."""
PAD = -1
_NEVER = torch.iinfo(torch.int32).max


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

    Differs: FAST writes the integers as characters and trains the BPE of a text library; ours is below. An
    integer that the alphabet lacks becomes the nearest that it has.
    """

    def __init__(self, horizon: int, action_dim: int, vocabulary_size: int, scale: float) -> None:
        super().__init__()
        self.horizon, self.action_dim, self.scale = horizon, action_dim, scale
        self.num_numbers = horizon * action_dim
        self.vocabulary_size = vocabulary_size
        spelling = torch.full((vocabulary_size, self.num_numbers), PAD, dtype=torch.int64)
        spelling[:, 0] = torch.arange(vocabulary_size)
        self.cosines = nn.Buffer(cosine_matrix(horizon), persistent=False)
        self.pairs = nn.Buffer(torch.full((vocabulary_size, 2), -1, dtype=torch.int64))
        self.spelling = nn.Buffer(spelling)
        self.lowest = nn.Buffer(torch.tensor(-(vocabulary_size // 2)))
        self.num_symbols = nn.Buffer(torch.tensor(vocabulary_size))
        self.num_tokens = nn.Buffer(torch.tensor(vocabulary_size))
        self.longest = nn.Buffer(torch.tensor(self.num_numbers))

    @torch.no_grad()
    def fit(self, actions: Float[Tensor, "n t a"], has: Bool[Tensor, "n a"] | None = None) -> None:
        """Learns the alphabet and the pairs. The same chunks give the same tokens. `has` as in `encode`.

        Raises: UserError if the vocabulary cannot hold the integers that occur.
        """
        integers, kept = self._integers(actions.to(self.cosines)), self._kept(has)
        lowest, count = self._alphabet(integers if kept is None else integers[kept][None])
        self.lowest.fill_(lowest)
        self.num_symbols.fill_(count)
        some = self.spread(front(self._symbols(integers), kept))
        learned = learn_pairs(some, count, self.vocabulary_size)
        self.pairs.fill_(-1)
        self.pairs[count : count + len(learned)] = learned.to(self.pairs.device)
        self.num_tokens.fill_(count + len(learned))
        self.spelling.copy_(spell(self.pairs.cpu(), count + len(learned), self.num_numbers))
        self.longest.fill_(int(encode(some, self.pairs)[1].max()))

    def spread(self, chunks: Tensor) -> Tensor:
        """Chunks (or what there is of each) evenly spread, with FIT_NUMBERS numbers at most."""
        return chunks[:: -(-len(chunks) * self.num_numbers // FIT_NUMBERS)]

    def encode(
        self, actions: Float[Tensor, "b t a"], has: Bool[Tensor, "b a"] | None = None
    ) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
        """Tokens of each chunk, padded with -1, and their numbers. Padded to the longest of them; where to
        look for it would make the host wait (on a GPU), to as many as a chunk has numbers. Of dimensions
        that a chunk's robot has not (`has`; None: it has all) nothing is written."""
        return encode(front(self._symbols(self._integers(actions)), self._kept(has)), self.pairs)

    def decode(
        self, tokens: Int[Tensor, "b n"], has: Bool[Tensor, "b a"] | None = None
    ) -> Float[Tensor, "b t a"]:
        """The chunk that the tokens spell; -1 spells nothing, and a dimension that is not there is 0.

        Too few numbers are filled up with zeros, which are the highest frequencies; too many are cut off.
        """
        spelled = torch.where(tokens[..., None] == PAD, PAD, self.spelling[tokens.clamp(min=0)])
        lengths = (spelled != PAD).sum(-1)
        starts = lengths.cumsum(1) - lengths
        places = starts[..., None] + torch.arange(self.num_numbers, device=tokens.device)
        nowhere = (spelled == PAD) | (places >= self.num_numbers)
        places = torch.where(nowhere, self.num_numbers, places)
        values = (spelled + self.lowest).to(self.cosines.dtype) / self.scale
        coefficients = values.new_zeros(tokens.shape[0], self.num_numbers + 1)
        coefficients.scatter_(1, places.flatten(1), values.flatten(1))
        coefficients = coefficients[:, :-1]
        if (kept := self._kept(has)) is not None:
            places = (kept.cumsum(1) - 1).clamp(min=0)
            coefficients = torch.where(kept, coefficients.gather(1, places), 0.0)
        return exact_product(self.cosines.mT, coefficients.unflatten(1, (self.horizon, self.action_dim)))

    def numbers_of(self, has: Bool[Tensor, "b a"] | None) -> int | Int[Tensor, "b 1"]:
        """How many numbers a chunk has."""
        return self.num_numbers if has is None else self.horizon * has.sum(1, keepdim=True)

    def _kept(self, has: Bool[Tensor, "b a"] | None) -> Bool[Tensor, "b n"] | None:
        return None if has is None else has.repeat(1, self.horizon)

    def lengths(self) -> Int[Tensor, " v"]:
        """How many numbers each token spells; unused tokens spell more than a chunk has."""
        spelled = (self.spelling != PAD).sum(-1)
        return torch.where(spelled == 0, self.num_numbers + 1, spelled)

    @torch.no_grad()
    def report(
        self, actions: Float[Tensor, "n t a"], has: Bool[Tensor, "n a"] | None = None
    ) -> dict[str, int | float]:
        """How short and how exact the tokens of these chunks are.

        `ratio` is numbers per token: t * a over the mean number of tokens. `clamped` is the share of
        coefficients outside the alphabet, `rounding_l1` the mean |a - decode(encode(a))|, normalised.
        """
        integers = self._integers(actions.to(self.cosines))
        tokens, lengths = self.encode(actions.to(self.cosines), has)
        there = torch.ones_like(actions, dtype=torch.bool) if has is None else has[:, None].expand_as(actions)
        clamped = (self._symbols(integers) + self.lowest != integers)[there.flatten(1)].double().mean()
        mean = float(lengths.double().mean())
        return {
            "symbols": int(self.num_symbols),
            "joined": int(self.num_tokens - self.num_symbols),
            "numbers": self.num_numbers,
            "tokens_per_chunk": mean,
            "longest": int(lengths.max()),
            "ratio": float(there.double().sum()) / len(actions) / mean,
            "clamped": float(clamped),
            "rounding_l1": float((self.decode(tokens, has) - actions).abs()[there].mean()),
        }

    def _integers(self, actions: Float[Tensor, "b t a"]) -> Int[Tensor, "b n"]:
        return (self.scale * exact_product(self.cosines, actions)).round().long().flatten(1)

    def _symbols(self, integers: Int[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        # Against tensors, not numbers read from them, so that a device is not waited for.
        return (integers - self.lowest).clamp(min=0).minimum(self.num_symbols - 1)

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


def cosine_matrix(length: int) -> Float[Tensor, "t t"]:
    """The orthonormal DCT-II: row k holds sqrt((2 - [k = 0]) / T) cos(pi (t + 1/2) k / T)."""
    places = torch.arange(length, dtype=torch.float64)
    matrix = torch.cos(math.pi / length * places[:, None] * (places + 0.5)) * math.sqrt(2 / length)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def front(symbols: Int[Tensor, "b n"], kept: Bool[Tensor, "b n"] | None) -> Int[Tensor, "b n"]:
    """The kept ones of each row in front, in their order, padded with -1."""
    if kept is None:
        return symbols
    order = torch.argsort(~kept, dim=1, stable=True)
    return symbols.masked_fill(~kept, PAD).gather(1, order)


def learn_pairs(symbols: Int[Tensor, "b n"], num_symbols: int, num_tokens: int) -> Int[Tensor, "m 2"]:
    """The pairs to join, most frequent first after the earlier ones were joined (1508.07909).

    Token num_symbols + i stands for pair i. At most num_tokens - num_symbols pairs; fewer if no pair occurs
    twice any more. Overlaps count: 0 0 0 holds the pair (0, 0) twice. Of pairs equally frequent the one with
    the smaller left, then smaller right number goes first.
    """
    pairs: list[tuple[int, int]] = []
    tokens = symbols.clone()
    for number in range(num_symbols, num_tokens):
        left, right = tokens[:, :-1], tokens[:, 1:]
        codes = (left * num_tokens + right)[right != PAD]
        counts = torch.bincount(codes, minlength=1)
        best = int(counts.argmax())
        if counts[best] < 2:
            break
        pair = divmod(best, num_tokens)
        hit = (left == pair[0]) & (right == pair[1])
        rows = hit.any(1)
        tokens[rows] = join(tokens[rows], hit[rows], tokens.new_tensor(number))
        pairs.append(pair)
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def encode(
    symbols: Int[Tensor, "b n"], pairs: Int[Tensor, "v 2"]
) -> tuple[Int[Tensor, "b m"], Int[Tensor, " b"]]:
    """Joins, in every row at once, the pair learned first, until none is left. Gives tokens and lengths.

    `pairs[i]` is what token i stands for; (-1, -1) for a symbol or an unused number. A round joins at least
    one pair in every row that has one left, and the pair that a row joins is always a later one than before:
    hence as many rounds as can be needed, whatever the values, so that on a device the host never waits.
    """
    joined = joined_token(pairs)
    tokens = symbols
    for _ in range(min(symbols.shape[1], len(pairs)) - 1):
        left, right = tokens[:, :-1], tokens[:, 1:]
        new = joined[left.clamp(min=0), right.clamp(min=0)].masked_fill(right == PAD, _NEVER)
        hit = (new < _NEVER) & (new == new.amin(dim=1, keepdim=True))
        if readable(hit) and not bool(hit.any()):
            break
        tokens = join(tokens, hit, new.to(tokens.dtype))
    lengths = (tokens != PAD).sum(1)
    return tokens[:, : int(lengths.max())] if readable(tokens) else tokens, lengths


def join(tokens: Int[Tensor, "b n"], hit: Bool[Tensor, "b p"], new: Int[Tensor, "*p"]) -> Int[Tensor, "b n"]:
    """Tokens i and i + 1 of a row become new[i] wherever hit[i]."""
    # Hits overlap only in a run of one token paired with itself; from the left, every second one counts.
    spots = torch.arange(hit.shape[1], device=hit.device)
    begins = hit & ~F.pad(hit[:, :-1], (1, 0))
    run = torch.where(begins, spots, -1).cummax(-1).values
    hit = hit & ((spots - run) % 2 == 0)
    made = torch.cat([torch.where(hit, new, tokens[:, :-1]), tokens[:, -1:]], dim=1)
    kept = F.pad(~hit, (1, 0), value=True) & (tokens != PAD)
    b, n = tokens.shape
    places = torch.where(kept, kept.cumsum(1) - 1, n)
    # The largest at each place, not a plain scatter, which would sort on a GPU to be deterministic.
    return tokens.new_full((b, n + 1), PAD).scatter_reduce(1, places, made, "amax")[:, :n]


def joined_token(pairs: Int[Tensor, "v 2"]) -> Int[Tensor, "v v"]:
    """The number of the token that joins (left, right), or a number beyond all of them."""
    v = len(pairs)
    places = pairs[:, 0] * v + pairs[:, 1]
    places = torch.where(pairs[:, 0] >= 0, places, v * v)  # what is no pair goes to a place behind
    numbers = torch.arange(v, dtype=torch.int32, device=pairs.device)
    table = torch.full((v * v + 1,), _NEVER, dtype=torch.int32, device=pairs.device)
    return table.scatter_reduce(0, places, numbers, "amin")[:-1].view(v, v)


def spell(pairs: Int[Tensor, "v 2"], num_tokens: int, longest: int) -> Int[Tensor, "v n"]:
    """The symbols that each of the first `num_tokens` tokens stands for, padded with -1 to `longest`."""
    spelled: list[list[int]] = []
    table = torch.full((len(pairs), longest), PAD, dtype=torch.int64)
    for number, (left, right) in enumerate(pairs[:num_tokens].tolist()):
        spelled.append([number] if left < 0 else spelled[left] + spelled[right])
        table[number, : len(spelled[number])] = torch.tensor(spelled[number])
    return table
