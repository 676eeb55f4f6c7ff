"""Instructions as texts: one identity for all spellings of a sentence, and tokens that lose nothing of it."""

from __future__ import annotations

import unicodedata
from string import ascii_lowercase, ascii_uppercase

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from test_data_order import Store, unit

from tutti.data.bundle import texts_of
from tutti.data.episodes import Episode
from tutti.data.normalize import EmbodimentStats, Normalizer
from tutti.data.split import first_episodes
from tutti.data.tokenize import Tokenizer, normalized_text
from tutti.data.windows import Source, WindowIndex

SPELLINGS = ("Open  it", "\topen it \n", "open\u00a0it", "OPEN\u3000IT", "\uff4fpen it", "open \u200b it")
BLANKS = " \t\n\r\v\f\x1c\x1f\x85\u00a0\u1680\u2003\u2028\u2029\u202f\u205f\u3000\u200b\u2060\ufeff"
ASCII_CAPITALS = str.maketrans(ascii_lowercase, ascii_uppercase)

words = st.lists(st.text(st.characters(exclude_categories=["Cs", "Z", "Cc", "Cf"]), min_size=1), max_size=5)
blanks = st.text(st.sampled_from(BLANKS), min_size=1, max_size=4)


# --- one identity


@given(st.text(st.characters()))
def test_normalised_texts_stay_what_they_are(text: str) -> None:
    once = normalized_text(text)
    assert normalized_text(once) == once == once.strip()
    assert unicodedata.is_normalized("NFKC", once) and not set(once) & set(BLANKS[1:]) and "  " not in once


@given(words, st.data())
def test_blanks_and_case_do_not_matter(parts: list[str], data: st.DataObject) -> None:
    text = " ".join(parts)
    other = "".join(data.draw(blanks) + part for part in parts) + data.draw(blanks)
    assert normalized_text(other) == normalized_text(text) == normalized_text(text.translate(ASCII_CAPITALS))


def test_spellings_of_one_sentence_are_one_instruction_everywhere() -> None:
    store = Store("arm", (2, 3, 4), 0)
    store.instructions = ("Open  it", "push it", "open it")
    store.episodes = tuple(
        Episode(e.index, e.start, e.length, store.instructions[e.index]) for e in store.episodes
    )
    frames = np.zeros((9, 1, 3, 2, 2), np.uint8)
    normalizer = Normalizer("standard", {"arm": EmbodimentStats(state=unit(1), action=unit(2))})
    tokenizer = Tokenizer.fit(store.instructions)
    index = WindowIndex([Source(store, frames)], horizon=2, normalizer=normalizer, tokenizer=tokenizer)
    assert index.instructions == ("open it", "push it") == tuple(sorted(texts_of(store, store.episodes)))
    batch = index.gather(np.arange(9))
    assert batch.instruction_id.tolist() == [0] * 2 + [1] * 3 + [0] * 4
    assert len(first_episodes(store.episodes, 1, seed=0)) == 2
    ids, mask = tokenizer.encode(SPELLINGS)
    assert (ids == ids[0]).all() and (mask == mask[0]).all()
