"""Byte-pair encoding of integer sequences: learns which neighbours to join, and joins them.

Symbols are 0 ... num_symbols - 1; each join makes the next number. Many sequences lie end to end in one
vector `tokens`, and `rows` says to which of them each token belongs. Nothing depends on an order of hashing:
of pairs equally frequent the one with the smaller left, then smaller right number is joined first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

_NEVER = torch.iinfo(torch.int32).max


def learn(
    tokens: Int[Tensor, " n"], rows: Int[Tensor, " n"], num_symbols: int, num_tokens: int
) -> Int[Tensor, "m 2"]:
    """The pairs to join, most frequent first after the earlier ones were joined (1508.07909).

    Token num_symbols + i stands for pair i. At most num_tokens - num_symbols pairs; fewer if no pair occurs
    twice any more. Overlaps count: 0 0 0 holds the pair (0, 0) twice.
    """
    pairs: list[tuple[int, int]] = []
    for new in range(num_symbols, num_tokens):
        inside = rows[:-1] == rows[1:]
        codes = (tokens[:-1] * num_tokens + tokens[1:])[inside]
        if not len(codes):
            break
        counts = torch.bincount(codes)
        best = int(counts.argmax())
        if counts[best] < 2:
            break
        left, right = divmod(best, num_tokens)
        hit = inside & (tokens[:-1] == left) & (tokens[1:] == right)
        tokens, rows = join(tokens, rows, hit, torch.full_like(hit, new, dtype=tokens.dtype))
        pairs.append((left, right))
    return torch.tensor(pairs, dtype=torch.int64).view(-1, 2)


def encode(
    tokens: Int[Tensor, " n"], rows: Int[Tensor, " n"], num_rows: int, pairs: Int[Tensor, "v 2"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Joins, in every row at once, the pair learned first, until none is left. Gives tokens and their rows.

    `pairs[i]` is what token i stands for; (-1, -1) for a symbol or an unused number.
    """
    joined = joined_token(pairs)
    while True:
        new = torch.where(rows[:-1] == rows[1:], joined[tokens[:-1], tokens[1:]], _NEVER)
        first = torch.full((num_rows,), _NEVER, dtype=new.dtype, device=new.device)
        first = first.scatter_reduce(0, rows[:-1], new, "amin")
        hit = (new < _NEVER) & (new == first[rows[:-1]])
        if not bool(hit.any()):
            return tokens, rows
        tokens, rows = join(tokens, rows, hit, new.to(tokens.dtype))


def encode_waiting_for_nothing(
    symbols: Int[Tensor, "b n"], pairs: Int[Tensor, "v 2"]
) -> tuple[Int[Tensor, "b n"], Int[Tensor, " b"]]:
    """The tokens of `encode`, each row padded with -1 to the length of the symbols, and their numbers.

    For a device: no size and no end depends on a value, so the host never waits. A round joins at least one
    pair in every row that has one left, and the pair that a row joins is always a later one than before:
    hence as many rounds as can be needed, whatever the values.
    """
    joined = joined_token(pairs)
    b, n = symbols.shape
    tokens = symbols
    for _ in range(min(n, len(pairs)) - 1):
        left, right = tokens[:, :-1], tokens[:, 1:]
        new = joined[left.clamp(min=0), right.clamp(min=0)].masked_fill(right < 0, _NEVER)
        hit = _every_second((new < _NEVER) & (new == new.amin(dim=1, keepdim=True)))
        made = torch.cat([torch.where(hit, new.to(tokens.dtype), left), tokens[:, -1:]], dim=1)
        kept = F.pad(~hit, (1, 0), value=True) & (tokens >= 0)
        places = torch.where(kept, kept.cumsum(1) - 1, n)
        # The largest at each place, not a plain scatter, which would sort on a GPU to be deterministic.
        tokens = tokens.new_full((b, n + 1), -1).scatter_reduce(1, places, made, "amax")[:, :n]
    return tokens, (tokens >= 0).sum(1)


def joined_token(pairs: Int[Tensor, "v 2"]) -> Int[Tensor, "v v"]:
    """The number of the token that joins (left, right), or a number beyond all of them."""
    table = torch.full((len(pairs) ** 2 + 1,), _NEVER, dtype=torch.int32, device=pairs.device)
    numbers = torch.arange(len(pairs), dtype=torch.int32, device=pairs.device)
    places = pairs[:, 0] * len(pairs) + pairs[:, 1]
    places = torch.where(pairs[:, 0] >= 0, places, len(pairs) ** 2)  # what is no pair goes to a place behind
    return table.scatter_reduce(0, places, numbers, "amin")[:-1].view(len(pairs), len(pairs))


def join(
    tokens: Int[Tensor, " n"], rows: Int[Tensor, " n"], hit: Tensor, new: Int[Tensor, " p"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " m"]]:
    """Tokens i and i + 1 become new[i] wherever hit[i]."""
    hit = _every_second(hit)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[1:] = ~hit
    tokens = tokens.clone()
    tokens[:-1] = torch.where(hit, new, tokens[:-1])
    return tokens[kept], rows[kept]


def _every_second(hit: Bool[Tensor, "*b p"]) -> Bool[Tensor, "*b p"]:
    """Hits overlap only in a run of one token paired with itself; from the left, every second one counts."""
    places = torch.arange(hit.shape[-1], device=hit.device)
    begins = hit & ~F.pad(hit[..., :-1], (1, 0))
    run = torch.where(begins, places, -1).cummax(-1).values
    return hit & ((places - run) % 2 == 0)


def spell(pairs: Int[Tensor, "v 2"], num_tokens: int, longest: int) -> Int[Tensor, "v n"]:
    """The symbols that each of the first `num_tokens` tokens stands for, padded with -1 to `longest`."""
    spelled: list[list[int]] = []
    for number, (left, right) in enumerate(pairs[:num_tokens].tolist()):
        spelled.append([number] if left < 0 else spelled[left] + spelled[right])
    table = torch.full((len(pairs), longest), -1, dtype=torch.int64)
    for number, symbols in enumerate(spelled):
        table[number, : len(symbols)] = torch.tensor(symbols)
    return table
