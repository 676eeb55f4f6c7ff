"""Does the text say anything: does it belong to its episode, and does it help to predict actions?

Two permutation tests in which whole episodes exchange their instructions. Text that was shuffled between
episodes fails both; text that is tied to anything in its episodes (the scene, the motion, the length) passes
the first. Both are exact: their p is at most 1 % in 1 % of data sets whose text is shuffled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import numpy as np
import torch
from jaxtyping import Float64, Int64

from tutti.data.bundle import DataBundle, Sample, spread, states
from tutti.evaluation.probes.ridge_probes import thumbnails
from tutti.findings import TEXT_EPISODES_MIN, TEXT_P_MAX, Finding

EPISODES, WINDOWS = 400, 300
PERMUTATIONS, REGRESSIONS = 999, 99
STRENGTHS = (0.1, 1.0)
"""How far the text may bend the map to the action."""
PENALTIES = (0.01, 0.1, 1.0, 10.0)
"""Variances of the noise that are tried, the target's being 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTest:
    """`dependence_p`: episode and instruction are independent (HSIC of the episodes' first and last states
    and pictures and their first action, and the text's words). `gain_p`: R2 of the first action from state,
    thumbnails and text, on left-out episodes, is not higher (`with_text`) than with exchanged texts;
    `without_text` is R2 without any.
    """

    episodes: int
    texts: int
    dependence_p: float
    gain_p: float
    with_text: float
    without_text: float

    @property
    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"Text: {self.texts} instructions over {self.episodes} episodes; independent of the episode "
            f"p = {self.dependence_p:.2g}; R2 of the action from state and pictures {self.without_text:.2f}, "
            f"and with the text {self.with_text:.2f}."
        )

    @property
    def helps(self) -> bool:
        """Whether the text helps to predict the action beside state and pictures, by more than chance."""
        return self.gain_p <= TEXT_P_MAX and self.with_text > self.without_text

    @property
    def says_nothing(self) -> bool:
        """Whether neither test sees a tie between the text and its episodes."""
        return self.dependence_p > TEXT_P_MAX and self.gain_p > TEXT_P_MAX


def check_text(data: DataBundle, seed: int = 0) -> tuple[TextTest | None, list[Finding]]:
    """Both tests over all episodes, or `EPISODES` of them evenly spread; None where they cannot be asked."""
    texts = data.windows.instructions
    rows = [
        data.windows.rows_of(number, source.store.episodes)
        for number, source in enumerate(data.windows.sources)
    ]
    first, last = _ends(data, np.concatenate(rows))
    ids = _instructions(first)
    if len(set(ids.tolist())) < 2:
        text = "There is one instruction: the text cannot say anything, here or later."
        return None, [Finding(kind="one_instruction", severity="hint", sentence=text)]
    if len(first) < TEXT_EPISODES_MIN:
        text = (
            f"{len(first)} episodes are too few to test whether the text says anything; {TEXT_EPISODES_MIN} "
            "are needed."
        )
        return None, [Finding(kind="few_episodes", severity="hint", sentence=text, number=len(first))]
    similar = text_kernel(texts)
    random = np.random.default_rng([seed, 6])
    dependence = independence_p(episode_kernel(first, last), similar[np.ix_(ids, ids)], random)
    sample = spread(data.windows, np.concatenate(rows), WINDOWS)
    gain, with_text, without = regression_p(sample, similar, random)
    found = TextTest(
        episodes=len(first),
        texts=len(set(ids.tolist())),
        dependence_p=dependence,
        gain_p=gain,
        with_text=with_text,
        without_text=without,
    )
    return found, _judge(found)


def _judge(found: TextTest) -> list[Finding]:
    scores = f"R2 {found.with_text:.2f} with it, {found.without_text:.2f} without"
    if found.says_nothing:
        return [
            Finding(
                kind="unrelated_text",
                severity="fault",
                sentence=f"No link of instruction and actions was found in {found.episodes} episodes: "
                "neither does what is seen and done in an episode go with its own text (p = "
                f"{found.dependence_p:.2g}), nor does the text help to predict the action from state and "
                f"pictures (p = {found.gain_p:.2g}; {scores}). Is the text shuffled?",
                number=found.dependence_p,
                cure="Compare the instruction of some episodes with their pictures.",
            )
        ]
    if not found.helps:
        text = (
            f"The text belongs to its episodes (p = {found.dependence_p:.2g}), but is not shown to help a "
            f"regression from state and pictures to the action (p = {found.gain_p:.2g}; {scores}): the scene "
            "may give the task away."
        )
        return [Finding(kind="text_adds_nothing", severity="hint", sentence=text, number=found.gain_p)]
    return []


def text_kernel(texts: Sequence[str]) -> Float64[np.ndarray, "n n"]:
    """(cosine of the tf-idf word counts + 1[same text]) / 2. Words that every text has count nothing."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    documents = Counter(word for count in counts for word in count)
    words = {word: place for place, word in enumerate(sorted(documents))}
    table = np.zeros((len(texts), len(words)))
    for row, count in enumerate(counts):
        for word, times in count.items():
            table[row, words[word]] = times * log(len(texts) / documents[word])
    length = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / np.where(length > 0, length, 1.0)
    same = np.array([[a == b for b in texts] for a in texts], dtype=np.float64)
    return (unit @ unit.T + same) / 2


def episode_kernel(first: Sample, last: Sample) -> Float64[np.ndarray, "e e"]:
    """exp(-(d_motion / median + d_picture / median) / 2): d squared distances between the episodes' first and
    last states and first actions, and between their first and last thumbnails."""
    motion = np.concatenate([states(first), states(last), first.actions(1)[0][:, 0]], axis=1)
    pictures = np.concatenate([thumbnails(first), thumbnails(last)], axis=1)
    return np.exp(-(_relative(motion) + _relative(pictures)) / 2)


def independence_p(
    content: Float64[np.ndarray, "e e"],
    text: Float64[np.ndarray, "e e"],
    random: np.random.Generator,
    permutations: int = PERMUTATIONS,
) -> float:
    """p of the permutation test of HSIC = sum (H K H) * L, episodes exchanging their texts.

    Source: Gretton et al., A Kernel Statistical Test of Independence (NIPS 2007). Differs: the exact
    permutation distribution in place of the gamma approximation; the unnormalised statistic.
    """
    centred = content - content.mean(0) - content.mean(1, keepdims=True) + content.mean()
    own = float((centred * text).sum())
    drawn = [random.permutation(len(text)) for _ in range(permutations)]
    above = sum(float((centred * text[np.ix_(order, order)]).sum()) >= own for order in drawn)
    return (1 + above) / (1 + permutations)


def regression_p(
    sample: Sample, similar: Float64[np.ndarray, "i i"], random: np.random.Generator, draws: int = REGRESSIONS
) -> tuple[float, float, float]:
    """(p, R2 with the text, R2 without): kernel ridge to the first action, each episode left out in turn,
    with the kernel k (1 + c l(text, text')), the better c of `STRENGTHS`, and with k alone, which is 1 + a
    Gaussian kernel of the state + a Gaussian and a linear one of the thumbnails. The pictures must be in it:
    where two objects are in sight, and the text names one, the text tells nothing without them.

    The penalty is the one that is best without the text, so that it does not depend on how the texts lie; c
    is chosen anew for every exchange of them.
    """
    target = sample.actions(1)[0][:, 0]
    target = (target - target.mean(0)) / np.where(target.std(0) > 1e-6, target.std(0), np.inf)
    state = states(sample)
    pictures = thumbnails(sample)
    linear = (pictures - pictures.mean(0)) @ (pictures - pictures.mean(0)).T
    kernel = 1 + np.exp(-_relative(state) / 2) + np.exp(-_relative(pictures) / 2)
    kernel += linear / max(float(np.trace(linear)) / len(linear), 1e-12)
    blocks = [np.flatnonzero(sample.episode == number) for number in range(sample.num_episodes)]
    scored = {penalty: _left_out_r2(kernel, target, blocks, penalty) for penalty in PENALTIES}
    penalty = max(scored, key=lambda candidate: scored[candidate])
    text_of = _instructions(sample)[[block[0] for block in blocks]]

    def score(order: Int64[np.ndarray, " e"]) -> float:
        ids = text_of[order][sample.episode]
        shared = similar[np.ix_(ids, ids)]
        return max(_left_out_r2(kernel * (1 + c * shared), target, blocks, penalty) for c in STRENGTHS)

    own = score(np.arange(len(blocks)))
    above = sum(score(random.permutation(len(blocks))) >= own for _ in range(draws))
    return (1 + above) / (1 + draws), own, scored[penalty]


def _left_out_r2(
    kernel: Float64[np.ndarray, "n n"],
    target: Float64[np.ndarray, "n a"],
    blocks: Sequence[np.ndarray],
    penalty: float,
) -> float:
    """R2 of kernel ridge with each block left out, from one inverse: the residual of block b is
    (C_bb)^-1 (C y)_b with C = (K + penalty I)^-1 (Rasmussen and Williams 2006, 5.4.2, for a block)."""
    # By torch, whose number of threads is the run's: numpy's own would contend with a training beside it.
    inverse = torch.linalg.inv(torch.from_numpy(kernel + penalty * np.eye(len(kernel)))).numpy()
    weights = inverse @ target
    left = 0.0
    for size in {len(block) for block in blocks}:
        alike = np.stack([block for block in blocks if len(block) == size])
        corners = inverse[alike[:, :, None], alike[:, None, :]]
        left += float(np.square(np.linalg.solve(corners, weights[alike])).sum())
    return 1 - left / max(float(np.square(target).sum()), 1e-12)


def _relative(values: Float64[np.ndarray, "n p"]) -> Float64[np.ndarray, "n n"]:
    """Squared distances between standardised rows over their median."""
    deviation = values.std(0)
    z = (values - values.mean(0)) / np.where(deviation > 1e-6, deviation, np.inf)
    square = np.square(z).sum(1)
    distance = np.maximum(square[:, None] + square[None, :] - 2 * z @ z.T, 0)
    return distance / max(float(np.median(distance)), 1e-12)


def _ends(data: DataBundle, rows: Int64[np.ndarray, " n"]) -> tuple[Sample, Sample]:
    """The first and the last window of at most `EPISODES` episodes."""
    rows = np.sort(rows)
    ends, places = np.unique(data.windows.episodes_of(rows), return_index=True)
    starts = rows[places]
    if len(ends) > EPISODES:
        chosen = np.linspace(0, len(ends) - 1, EPISODES).round().astype(np.int64)
        ends, starts = ends[chosen], starts[chosen]
    return spread(data.windows, starts, len(starts)), spread(data.windows, ends - 1, len(starts))


def _instructions(sample: Sample) -> Int64[np.ndarray, " n"]:
    return np.concatenate([batch.instruction_id.numpy() for batch in sample.batches()])
