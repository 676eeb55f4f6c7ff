"""The FAST decoder: cosine transform, alphabet, byte pairs, and the transformer that writes them."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import scipy.fft
import torch
from torch import Tensor

from fixtures.small_decoders import (
    ACTION,
    HORIZON,
    batch,
    build,
    chunks,
    doubled,
    features,
    fitted,
    gradients,
    holes,
)
from tutti.distributed.ranks import Ranks
from tutti.distributed.world import World
from tutti.models.decoders import fast_tokens as chunk_tokens
from tutti.models.decoders.fast import FastDecoder, hold_last
from tutti.models.decoders.fast_tokens import PAD, ChunkTokens, cosine_matrix, encode, learn_pairs, spell
from tutti.types import UserError, masked_mean

NUMBERS = HORIZON * ACTION


def decoder(**options: Any) -> FastDecoder:
    made = fitted("fast", **options)
    assert isinstance(made, FastDecoder)
    return made


def tokenizer(scale: float = 10.0, vocabulary_size: int = 256, seed: int = 7) -> ChunkTokens:
    made = ChunkTokens(HORIZON, ACTION, vocabulary_size, scale)
    made.fit(chunks(256, seed)[0])
    return made


def naive_bpe(symbols: list[int], pairs: list[tuple[int, int]], first: int) -> list[int]:
    """Every learned pair in turn, each from the left: what `encode` must equal."""
    for number, pair in enumerate(pairs):
        joined: list[int] = []
        for symbol in symbols:
            if joined and (joined[-1], symbol) == pair:
                joined[-1] = first + number
            else:
                joined.append(symbol)
        symbols = joined
    return symbols


def padded(sequences: list[list[int]]) -> Tensor:
    longest = max(map(len, sequences))
    return torch.tensor([[*sequence, *[PAD] * (longest - len(sequence))] for sequence in sequences])


@pytest.mark.parametrize(
    ("sequences", "symbols", "tokens", "pairs"),
    [
        # (1, 2) occurs three times, which leaves 3 0 3 0 and 0 0 3: (0, 3) and (3, 0) twice each, the smaller
        # left one goes first and leaves 3 4 0 and 0 4, where nothing occurs twice.
        ([[1, 2, 0, 1, 2, 0], [0, 0, 1, 2]], 3, 9, [[1, 2], [0, 3]]),
        ([[1, 2, 0, 1, 2, 0], [0, 0, 1, 2]], 3, 4, [[1, 2]]),
        # Equally frequent: the smaller left, then the smaller right symbol goes first.
        ([[2, 1], [2, 1], [0, 3], [0, 3], [0, 2], [0, 2]], 4, 7, [[0, 2], [0, 3], [2, 1]]),
        # No pair reaches across the end of a sequence.
        ([[5], [6], [5], [6]], 7, 9, []),
    ],
)
def test_pairs_are_learned_by_hand(
    sequences: list[list[int]], symbols: int, tokens: int, pairs: list[list[int]]
) -> None:
    assert learn_pairs(padded(sequences), symbols, tokens).tolist() == pairs


def test_of_overlapping_pairs_the_left_one_counts() -> None:
    tokens, lengths = encode(padded([[0] * 5, [0] * 4]), torch.tensor([[-1, -1], [0, 0], [-1, -1]]))
    assert tokens.tolist() == [[1, 1, 0], [1, 1, PAD]] and lengths.tolist() == [3, 2]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_joining_all_rows_at_once_equals_joining_one_pair_after_the_other(
    seed: int, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:  # without a look at a value
        monkeypatch.setattr(chunk_tokens, "readable", lambda tensor: False)
    random = torch.Generator().manual_seed(seed)
    symbols = torch.randint(0, 4, (40, 30), generator=random)
    symbols[0] = 0  # a run of one symbol, joined with itself
    table = torch.full((40, 2), -1)
    table[4:] = learn_pairs(symbols[:20], 4, 40)
    tokens, lengths = encode(symbols, table)
    assert tokens.shape[1] == (30 if on_device else lengths.max())
    spelled = spell(table, 40, 30)
    for row, sequence in enumerate(symbols.tolist()):
        mine = tokens[row, : lengths[row]]
        assert mine.tolist() == naive_bpe(sequence, [(left, right) for left, right in table[4:].tolist()], 4)
        assert bool((tokens[row, lengths[row] :] == PAD).all())
        assert spelled[mine][spelled[mine] != PAD].tolist() == sequence


def test_longer_padding_changes_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen, given = decoder(), features(), batch()
    short = made(seen, given)
    monkeypatch.setattr(chunk_tokens, "readable", lambda tensor: False)
    torch.testing.assert_close(made(seen, given), short, rtol=1e-6, atol=1e-6)


def test_the_transform_is_the_orthonormal_dct() -> None:
    matrix = cosine_matrix(7).double()
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(7, dtype=torch.float64), rtol=0, atol=1e-6)
    x = torch.randn(7, 3, dtype=torch.float64)
    expected = torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho", axis=0))
    torch.testing.assert_close(matrix @ x, expected, rtol=0, atol=1e-6)


def test_low_frequencies_come_first_with_all_dimensions_of_one_together() -> None:
    tokens = ChunkTokens(HORIZON, ACTION, 256, 10.0)  # not fitted: a token is a symbol is an integer + 128
    chunk = torch.zeros(1, HORIZON, ACTION)
    chunk[0] = 10 * cosine_matrix(HORIZON)[0][:, None] * torch.tensor([0.1, 0.2, 0.3])
    chunk[0, :, 1] += 0.5 * cosine_matrix(HORIZON)[2]
    found, lengths = tokens.encode(chunk)
    assert lengths.tolist() == [NUMBERS]
    assert (found - 128).tolist() == [[10, 20, 30, 0, 0, 0, 0, 5, 0, *[0] * 6]]


@pytest.mark.parametrize("scale", [3.0, 10.0, 40.0])
def test_a_round_trip_is_off_by_the_rounding_and_no_more(scale: float) -> None:
    tokens = tokenizer(scale, vocabulary_size=1024)
    for actions in (chunks(256, seed=7)[0], 0.9 * chunks(64, seed=8)[0]):
        again = tokens.decode(tokens.encode(actions)[0])
        off = again - actions
        assert float(off.norm(dim=1).max()) <= 0.5 * HORIZON**0.5 / scale + 1e-5
        twice = tokens.decode(tokens.encode(again)[0])
        torch.testing.assert_close(twice, again, rtol=0, atol=1e-6)


def test_the_same_chunks_give_the_same_vocabulary_and_others_another() -> None:
    first, second = tokenizer(), tokenizer()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
        assert not value.is_floating_point()
    assert not torch.equal(first.pairs, tokenizer(seed=8).pairs)
    second.fit(chunks(64, seed=8)[0])
    second.fit(chunks(256, seed=7)[0])
    assert torch.equal(first.pairs, second.pairs) and torch.equal(first.spelling, second.spelling)


def test_pairs_are_learned_from_a_share_of_many_chunks_and_the_alphabet_from_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actions = chunks(100, seed=7)[0]
    actions[1] = 30.0  # in the alphabet, though the share has every fourth chunk only
    monkeypatch.setattr("tutti.models.decoders.fast_tokens.FIT_NUMBERS", 25 * NUMBERS)
    tokens = ChunkTokens(HORIZON, ACTION, 2048, 10.0)
    assert torch.equal(tokens.spread(actions), actions[::4])
    tokens.fit(actions)
    assert tokens.report(actions)["clamped"] == 0
    coefficients = (10 * cosine_matrix(HORIZON) @ actions[::4]).round().long().flatten(1)
    pairs = learn_pairs(coefficients - tokens.lowest, int(tokens.num_symbols), 2048)
    learned_there = tokens.pairs[int(tokens.num_symbols) : int(tokens.num_tokens)]
    assert len(pairs) > 20 and torch.equal(learned_there, pairs)
    lengths = tokens.encode(actions[::4])[1]
    assert int(tokens.longest) == int(lengths.max())


def test_smooth_chunks_become_short() -> None:
    tokens = ChunkTokens(16, 2, 256, 10.0)
    random = torch.Generator().manual_seed(0)
    start, slope = torch.rand(2, 512, 1, 2, generator=random)
    smooth = start + 0.05 * slope * torch.arange(16)[None, :, None]
    tokens.fit(smooth)
    report = tokens.report(smooth)
    found, lengths = tokens.encode(smooth)
    assert report["ratio"] == pytest.approx(32 / float(lengths.double().mean()))
    assert report["ratio"] > 4 and report["clamped"] == 0
    assert report["longest"] == int(lengths.max()) == int(tokens.longest) == int((found != PAD).sum(1).max())
    assert 0 < report["rounding_l1"] < 0.05
    noise = torch.rand(512, 16, 2, generator=random)
    assert tokens.report(noise)["ratio"] < 2


def test_an_integer_that_was_never_seen_becomes_the_nearest_one() -> None:
    tokens = tokenizer()
    far = torch.full((1, HORIZON, ACTION), 1000.0)
    found = tokens.decode(tokens.encode(far)[0])
    highest = int(tokens.lowest + tokens.num_symbols - 1)
    coefficients = (10 * cosine_matrix(HORIZON) @ found).round()
    assert int(coefficients[0, 0].max()) == highest
    assert tokens.report(far)["clamped"] == pytest.approx(1 / HORIZON)


def test_rare_outliers_are_left_out_of_the_alphabet_and_many_are_refused() -> None:
    actions = chunks(400, seed=7)[0]
    actions[0] = 100.0
    tokens = ChunkTokens(HORIZON, ACTION, 128, 5.0)
    tokens.fit(actions)
    assert 0 < tokens.report(actions)["clamped"] < 0.005
    torch.testing.assert_close(tokens.decode(tokens.encode(actions[1:])[0]), actions[1:], rtol=0, atol=0.25)
    with pytest.raises(UserError, match=r"vocabulary_size 16 has room for 14.*at least \d+, or .*lower"):
        ChunkTokens(HORIZON, ACTION, 16, 10.0).fit(chunks(64, seed=7)[0])


def test_sequences_of_a_wrong_length_are_cut_or_filled_up() -> None:
    tokens = tokenizer()
    actions = chunks(3, seed=7)[0]
    right, _ = tokens.encode(actions)
    chunk = tokens.decode(right)
    more = torch.cat([right, right[:, :2].clamp(min=0)], dim=1)
    whole = (right != PAD).all(1)
    assert whole.any()
    assert torch.equal(tokens.decode(more)[whole], chunk[whole])
    symbols = (10 * cosine_matrix(HORIZON) @ chunk).round().flatten(1)
    first = right[:, :1]
    kept = int(tokens.lengths()[first[0, 0]])
    short = (10 * cosine_matrix(HORIZON) @ tokens.decode(first)).round().flatten(1)
    assert torch.equal(short[0, :kept], symbols[0, :kept])
    assert not short[0, kept:].any()
    assert torch.equal(tokens.decode(torch.full((1, 4), PAD)), torch.zeros(1, HORIZON, ACTION))


def test_masked_steps_hold_the_last_present_action() -> None:
    nan = float("nan")
    actions = torch.tensor([[[1.0, nan], [2.0, 5.0], [nan, 6.0], [nan, nan], [9.0, nan]]])
    mask = ~actions.isnan()
    held = hold_last(actions, mask)
    assert held[0, :, 0].tolist() == [1.0, 2.0, 2.0, 2.0, 9.0]
    assert held[0, :, 1].tolist() == [0.0, 5.0, 6.0, 6.0, 6.0]
    assert not hold_last(actions, torch.zeros_like(mask)).any()


def test_the_error_and_its_gradient_are_those_of_the_formula() -> None:
    fast = decoder().double()
    seen, given = features(dtype=torch.float64), doubled(batch(mask=holes()))
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens, lengths = fast.tokens.encode(hold_last(given.actions, given.action_mask))
    spelled = fast.tokens.lengths()
    condition = fast.conditioning(seen)
    total = torch.zeros((), dtype=torch.float64)
    for sample, length in enumerate(lengths.tolist()):
        own = replace(condition, vector=condition.vector[sample : sample + 1])
        entropy, lacking = torch.zeros((), dtype=torch.float64), NUMBERS
        for place in range(length):
            before = fast.embedding(tokens[sample : sample + 1, :place])
            x = torch.cat([own.vector[:, None], before], dim=1)
            logits = fast.out(fast.trunk(x, own))[0, -1]
            entropy = entropy + logits[spelled <= lacking].logsumexp(0) - logits[tokens[sample, place]]
            lacking -= int(spelled[tokens[sample, place]])
        assert lacking == 0
        total = total + entropy / length * given.action_mask[sample].sum()
    formula = total / given.action_mask.sum()
    value = masked_mean(fast(seen, given), given.action_mask)
    torch.testing.assert_close(value, formula, rtol=1e-12, atol=0)
    for mine, theirs in zip(gradients(fast, value), gradients(fast, formula), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cross_attention", [False, True])
def test_writing_with_a_cache_equals_reading_the_whole_sequence_again(cross_attention: bool) -> None:
    fast = decoder(cross_attention=cross_attention, depth=2).double()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    seen = features(6, dtype=torch.float64)
    written = fast.written(seen)
    again = fast.possible(fast.scores(seen, written), written, None).argmax(-1)
    assert torch.equal(torch.where(written == PAD, PAD, again), written)
    assert len(written.unique()) > 4


def test_what_is_written_spells_the_chunk_exactly() -> None:
    fast = decoder()
    fast.tokens.longest.fill_(NUMBERS)
    with torch.no_grad():
        fast.out.weight.normal_(std=3.0)
    written = fast.written(features(64))
    spelled = torch.where(written == PAD, 0, fast.tokens.lengths()[written.clamp(min=0)])
    assert bool((spelled.sum(1) == NUMBERS).all())
    assert int(written.max()) < int(fast.tokens.num_tokens) < 256
    assert (spelled > 1).any()


def test_ranks_write_equally_long_and_run_the_hooks_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP gathers a block's weights in its hooks: for a rank that stops early the others would wait."""
    fast, seen = decoder(), features(1)
    fast.tokens.longest.fill_(NUMBERS)
    written, calls = fast.written(seen), list[int]()
    monkeypatch.setattr("tutti.models.decoders.fast.world", lambda: World(ranks=Ranks(0, 2)))
    hook = fast.trunk.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = fast.written(seen)
    hook.remove()
    assert written.shape[1] < again.shape[1] == len(calls) == NUMBERS
    assert again[:, : written.shape[1]].equal(written) and bool((again[:, written.shape[1] :] == PAD).all())
    assert fast.tokens.decode(again, None).equal(fast.tokens.decode(written, None))


def test_writing_stops_at_the_longest_training_chunk() -> None:
    fast = decoder()
    fast.tokens.longest.fill_(3)
    assert fast.written(features()).shape[1] <= 3
    assert fast.predict(features()).shape == (4, HORIZON, ACTION)


def test_fit_says_what_it_found(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="tutti.models")
    fast = decoder()
    actions, mask = chunks(64, seed=7)
    report = fast.tokens.report(hold_last(actions, mask))
    assert f"takes {report['tokens_per_chunk']:.1f} tokens (at most {report['longest']})" in caplog.text
    assert 1 < report["ratio"] == pytest.approx(NUMBERS / report["tokens_per_chunk"])


def test_before_fit_every_token_is_one_number() -> None:
    fast = build("fast")
    assert isinstance(fast, FastDecoder)
    written: Tensor = fast.written(features())
    assert written.shape == (4, NUMBERS) and bool((written != PAD).all())
