"""A store of any format's reader: roles, lag, flip, chosen episodes, missing labels, errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fixtures.toy_reader import ROLES, SHAPE, ToyReader
from tutti.data.formats.chosen import Chosen
from tutti.data.formats.interface import Roles
from tutti.data.formats.mapped import MappedStore
from tutti.data.formats.wanted import Wanted
from tutti.types import Label, UserError


def with_labels(**labels: Any) -> Chosen:
    known: dict[Label, Any] = {"actions": True, "text": True, "state": True}
    return Chosen(labels=known | labels)  # type: ignore[arg-type]


def test_features_are_joined_in_their_order_with_names_and_units() -> None:
    store = MappedStore(ToyReader(), kind="toy")
    assert [(e.index, e.start, e.length, e.instruction) for e in store.episodes] == [
        (0, 0, 6, "open"),
        (1, 6, 5, "close"),
        (2, 11, 7, "open"),
    ]
    assert store.states.shape == (18, 4) and store.states.dtype == np.float32
    assert store.states[8].tolist() == pytest.approx([102, 102.1, 102.2, 102])
    assert store.actions[17].tolist() == pytest.approx([206, 206.1])
    spec = store.spec
    assert spec.state_names == ("x", "y", "z", "hand[0]") and spec.state_units == ("m", "m", "m", "")
    assert spec.action_names == ("action[0]", "action[1]") and spec.action_units == ()
    assert spec.views == ("obs.front", "obs.wrist") and spec.image_shapes == (SHAPE, SHAPE)
    assert (spec.fps, spec.embodiment, spec.num_frames) == (10.0, "arm", 18)
    assert store.format == "toy"
    assert store.remarks == ("toy: sources.state is auto: obs/arm, obs/hand (usual names)",)


def test_what_a_source_says_wins_and_is_no_guess() -> None:
    wanted = Wanted(views=("obs/wrist",), state=("obs/hand", "act"), action=("obs/hand",), fps=5.0, say="go")
    store = MappedStore(ToyReader(fps=None), wanted)
    assert store.spec.views == ("obs.wrist",) and store.spec.fps == 5.0 and store.remarks == ()
    assert store.states[7].tolist() == pytest.approx([101, 101, 101.1])
    assert store.roles.text is None  # no feature is the instruction
    assert store.instructions == ("go",) and {e.instruction for e in store.episodes} == {"go"}
    assert MappedStore(ToyReader(), Wanted(state=())).spec.state_dim == 0


def test_pictures_come_in_the_order_asked_and_each_is_read_once() -> None:
    reader = ToyReader()
    store = MappedStore(reader)
    reader.asked.clear()
    got = store.frames("obs.front", np.array([12, 0, 12, 7, 11]))
    assert got[:, 0, 0, :2].tolist() == [[1, 2], [0, 0], [1, 2], [1, 1], [0, 2]]
    assert reader.asked == [("obs/front", 0, [0]), ("obs/front", 1, [1]), ("obs/front", 2, [0, 1])]
    assert store.frames("obs.front", np.array([], np.int64)).shape == (0, *SHAPE, 3)


@pytest.mark.parametrize(("flip", "place"), [("none", (0, 0)), ("vertical", (-1, 0)), ("turned", (-1, -1))])
def test_pictures_are_turned_upright(flip: Any, place: tuple[int, int]) -> None:
    store = MappedStore(ToyReader(), Wanted(flip=flip))
    assert store.frames("obs.wrist", np.array([3]))[0][place].tolist() == [3, 0, 255]


def test_lag_pairs_an_action_with_the_observation_before_it() -> None:
    texts = ([f"step {t}" for t in range(6)], ("close",), ("open",))
    store = MappedStore(ToyReader(texts=texts), Wanted(lag=1))
    assert [(e.start, e.length) for e in store.episodes] == [(0, 5), (5, 4), (9, 6)]
    assert store.states[:5, 3].tolist() == [0, 1, 2, 3, 4] and store.actions[:5, 0].tolist() == [
        1,
        2,
        3,
        4,
        5,
    ]
    assert store.states[9, 3] == 200 and store.actions[9, 0] == 201
    assert store.frames("obs.front", np.array([4, 5]))[:, 0, 0, :2].tolist() == [[4, 0], [0, 1]]
    assert [store.instructions[i] for i in store.instruction_of[:5]] == [f"step {t}" for t in range(5)]


def test_flip_and_lag_are_other_contents_and_a_copy_is_the_same() -> None:
    plain = MappedStore(ToyReader()).content
    assert MappedStore(ToyReader()).content.fingerprint == plain.fingerprint
    flipped = MappedStore(ToyReader(), Wanted(flip="vertical")).content
    assert flipped.differences(plain) == ["pictures differ in episodes 0 to 2"]
    assert "actions differ in episodes 0 to 2" in MappedStore(ToyReader(), Wanted(lag=1)).content.differences(
        plain
    )


def test_only_the_chosen_episodes_are_read_and_parts_share_the_store() -> None:
    reader = ToyReader(damaged=(1,))
    chosen = [Chosen(episodes=(range(1),)), Chosen(episodes=(range(2, 3),))]
    store = MappedStore(reader, chosen=chosen)
    assert [np.flatnonzero(own).tolist() for own in store.parts] == [[0], [2]]
    assert [(e.index, e.start, e.length) for e in store.episodes] == [(0, 0, 6), (2, 6, 7)]
    assert {one[1] for one in reader.asked} == {0, 2}
    assert store.frames("obs.front", np.array([6]))[0, 0, 0].tolist() == [0, 2, 255]
    assert store.content.numbers == (0, 2)


NAN = np.full((5, 3), np.nan, np.float32)
SOME_NAN = np.array([[0, 0, 0]] * 4 + [[0, np.nan, 0]], np.float32)


def test_rows_of_nan_are_no_numbers_where_labels_may_be_missing() -> None:
    reader = ToyReader(numbers={("obs/arm", 1): NAN}, texts=(("open",), (" ",), ("open",)))
    lenient = with_labels(state="where_present", text="where_present")
    store = MappedStore(reader, chosen=[lenient])
    assert store.present["state"].tolist() == [True] * 6 + [False] * 5 + [True] * 7
    assert store.present["text"].tolist() == [True] * 6 + [False] * 5 + [True] * 7
    none = MappedStore(ToyReader(numbers={("obs/arm", 1): SOME_NAN}), chosen=[with_labels(state=False)])
    assert not none.present["state"][10]


WRONG: dict[str, tuple[dict[str, Any], Wanted, Any, str]] = {
    "NaN": (
        {"numbers": {("obs/arm", 1): NAN}}, Wanted(), with_labels(),
        r"obs/arm is nan in episode 1, row 0 .*\n.*finite numbers\n.*sources\.exclude=\[1\]",
    ),
    "a NaN among numbers": (
        {"numbers": {("obs/arm", 1): SOME_NAN}}, Wanted(), with_labels(state="where_present"),
        r"obs/arm is nan in episode 1, row 4 .*dimension 1; 1 such",
    ),
    "blank text": ({"texts": (("a",), ("",), ("b",))}, Wanted(), with_labels(), r"no instruction, such as 1"),
    "long text": ({"texts": (("a",), ("x" * 4097,), ("b",))}, Wanted(), with_labels(), "4,097 characters"),
    "texts of another count": (
        {"texts": (("a",), ("a", "b"), ("b",))}, Wanted(), with_labels(),
        r"episode 1 has 2 texts[\s\S]*exclude=\[1\]",
    ),
    "other rows": (
        {"numbers": {("act", 2): np.zeros((6, 2), np.float32)}}, Wanted(), with_labels(),
        r"act of episode 2 is \[6, 2\][\s\S]*\[7, 2\][\s\S]*sources\.exclude=\[2\]",
    ),
    "a short episode": (
        {"lengths": (6, 1, 7)}, Wanted(), with_labels(), r"episode 1 has 1 steps[\s\S]*exclude=\[1\]",
    ),
    "short by the lag": ({}, Wanted(lag=4), with_labels(), r"5 steps of which sources\.lag=4 takes 4"),
    "no rate": ({"fps": None}, Wanted(), with_labels(), r"steps there are in a second[\s\S]*sources\.fps=20"),
    "no such view": ({}, Wanted(views=("obs/frint",)), with_labels(), r"missing. Did you mean 'obs/front'"),
    "a view that is a vector": ({}, Wanted(views=("act",)), with_labels(), "of sources.views is a vector"),
    "no action": (
        {"roles": replace(ROLES, action=())}, Wanted(), with_labels(),
        r"which vector is the action[\s\S]*obs/arm \[3\], obs/hand \[1\], act \[2\][\s\S]*sources\.action",
    ),
    "no text": ({"roles": replace(ROLES, text=None)}, Wanted(), with_labels(), r"say: open the drawer"),
    "no view": ({"roles": Roles(action=("act",))}, Wanted(), with_labels(text=False, state=False), "a view"),
    "no such episode": ({}, Wanted(), Chosen(episodes=(range(3, 4),)), "names episode 3"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_with_its_way_out(case: str) -> None:
    given, wanted, chosen, said = WRONG[case]
    with pytest.raises(UserError, match=said):
        MappedStore(ToyReader(**given), wanted, [chosen])


def test_a_damaged_picture_names_the_episode_and_the_way_out() -> None:
    store = MappedStore(ToyReader(damaged=(1,)))
    with pytest.raises(UserError, match=r"episode 1 is damaged[\s\S]*sources\.exclude=\[1\]"):
        store.frames("obs.front", np.arange(18))
    assert MappedStore(ToyReader(damaged=(1,)), chosen=[Chosen(exclude=(range(1, 2),))]).content.fingerprint


def test_what_no_choice_asks_for_may_be_missing() -> None:
    reader = ToyReader(roles=Roles(views=("obs/front",)))
    store = MappedStore(reader, chosen=[with_labels(actions=False, state=False, text=False)])
    assert (store.spec.state_dim, store.spec.action_dim, store.instructions) == (0, 0, ("",))
