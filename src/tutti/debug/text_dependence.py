"""Does the text belong to its episode? A permutation test in which whole episodes exchange their texts."""

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

EPISODES, PERMUTATIONS = 400, 399
PENALTY = 0.1
"""Variance of the noise of the regression, where a text and an episode vary by 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTest:
    """`accuracy`: how often an episode finds its own text sooner than another one; `by_chance`: the mean
    of it over exchanges of the texts, `p` the share of exchanges with as high an accuracy."""

    episodes: int
    texts: int
    accuracy: float
    by_chance: float
    p: float

    @property
    def summary(self) -> str:
        """One line for the terminal."""
        return (
            f"Text: {self.texts} instructions over {self.episodes} episodes; from what is seen and done an "
            f"episode finds its own text sooner than another in {100 * self.accuracy:.0f} % "
            f"({100 * self.by_chance:.0f} % where texts are exchanged, p = {self.p:.2g})."
        )


def check_text(data: DataBundle, seed: int = 0) -> tuple[TextTest | None, list[Finding]]:
    """The test over all episodes, or `EPISODES` of them evenly spread; None where it cannot be made.

    A ridge regression from the episode to its text, each episode left out in turn, ranks the texts. Exact: p
    is at most 1 % in 1 % of the data sets whose text is shuffled.
    """
    windows = data.windows
    rows = [windows.rows_of(number, s.store.episodes) for number, s in enumerate(windows.sources)]
    all_rows = windows.having("text", windows.having("actions", np.sort(np.concatenate(rows))))
    if len(all_rows) == 0:
        said = "No episode has an instruction and actions: whether the text says anything cannot be tested."
        return None, [Finding(kind="few_episodes", severity="hint", sentence=said, number=0)]
    ends, places = np.unique(windows.episodes_of(all_rows), return_index=True)
    first, last = (spread(windows, own, EPISODES) for own in (all_rows[places], ends - 1))
    given = np.concatenate([batch.instruction_id.numpy() for batch in first.batches()])
    known, ids = np.unique(given, return_inverse=True)
    if len(known) < 2:
        said = "There is one instruction: the text cannot say anything, here or later."
        return None, [Finding(kind="one_instruction", severity="hint", sentence=said)]
    if len(ids) < TEXT_EPISODES_MIN:
        said = f"{len(ids)} episodes are too few to test the text; {TEXT_EPISODES_MIN} are needed."
        return None, [Finding(kind="few_episodes", severity="hint", sentence=said, number=len(ids))]
    smoother = left_out_smoother(episode_kernel(first, last))
    similar = text_kernel([windows.instructions[number] for number in known])
    own = retrieval(smoother, similar, ids)
    random = np.random.default_rng([seed, 6])
    drawn = [retrieval(smoother, similar, random.permutation(ids)) for _ in range(PERMUTATIONS)]
    found = TextTest(
        episodes=len(ids),
        texts=len(known),
        accuracy=own,
        by_chance=float(np.mean(drawn)),
        p=(1 + sum(one >= own for one in drawn)) / (1 + PERMUTATIONS),
    )
    if found.p <= TEXT_P_MAX:
        return found, []
    said = (
        f"No link of instruction and actions was found in {found.episodes} episodes: what is seen and done "
        f"in an episode does not go with its own text (p = {found.p:.2g}). Is the text shuffled?"
    )
    cure = "Compare the instruction of some episodes with their pictures."
    return found, [Finding(kind="unrelated_text", severity="fault", sentence=said, number=found.p, cure=cure)]


def episode_kernel(first: Sample, last: Sample) -> Float64[np.ndarray, "e e"]:
    """(1 + motion) (1 + picture), two linear kernels: of first and last state and first action, and of the
    first thumbnail. Their product is what tells where two objects are in sight and the text names one."""
    motion = np.concatenate([states(first), states(last), first.actions(1)[0][:, 0]], axis=1)
    deviation = motion.std(0)
    motion = motion / np.where(deviation > 1e-6, deviation, np.inf)
    kernel = np.ones((len(motion), len(motion)))
    for values in (motion, thumbnails(first)):
        centred = values - values.mean(0)
        product = centred @ centred.T
        kernel *= 1 + product / max(float(np.trace(product)) / len(product), 1e-12)
    return kernel


def left_out_smoother(kernel: Float64[np.ndarray, "e e"]) -> Float64[np.ndarray, "e e"]:
    """S, so that S y are ridge regression's predictions of y with each episode left out: from the hat matrix
    H = K (K + penalty I)^-1 of all, S = (H - diag H) / (1 - diag H)."""
    # By torch, whose number of threads is the run's: numpy's own would contend with a training beside it.
    noisy = torch.from_numpy(kernel + PENALTY * np.eye(len(kernel)))
    hat = torch.linalg.solve(noisy, torch.from_numpy(kernel)).numpy()
    own = np.diag(hat)
    return (hat - np.diag(own)) / (1 - own)[:, None]


def retrieval(
    smoother: Float64[np.ndarray, "e e"], similar: Float64[np.ndarray, "t t"], ids: Int64[np.ndarray, " e"]
) -> float:
    """Share of pairs (episode, other text) in which the episode's own text has the higher score."""
    scores = smoother @ similar[ids]
    own = scores[np.arange(len(ids)), ids][:, None]
    return float((own > scores).sum()) / (len(ids) * (len(similar) - 1))


def text_kernel(texts: Sequence[str]) -> Float64[np.ndarray, "n n"]:
    """(cosine of the tf-idf word counts + 1[same text]) / 2. Words that every text has count nothing."""
    counts = [Counter(re.findall(r"\w+", text.lower())) for text in texts]
    documents = Counter(word for count in counts for word in count)
    table = np.array([[n[word] * log(len(texts) / m) for word, m in documents.items()] for n in counts])
    length = np.linalg.norm(table, axis=1, keepdims=True)
    unit = table / np.where(length > 0, length, 1.0)
    return (unit @ unit.T + np.eye(len(texts))) / 2
