"""A finding: one sentence about a run with its number and its cure; and every threshold that findings use.

The report, `tutti doctor` and `tutti probe` judge by these thresholds alone, so they cannot contradict each
other. All are choices; the comment above each says what it rests on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["fault", "warning", "hint", "ok"]
SEVERITIES: tuple[Severity, ...] = ("fault", "warning", "hint", "ok")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What a check found. `kind` names the check, `number` is the measurement behind the sentence.

    `fault`: something does not do what the config says. `warning`: it will cost success. `hint`: worth
    knowing. `ok`: the check passed. `cure` is what to try, empty where there is nothing to do. `term` and
    `part` are empty where the finding is about no single one.
    """

    kind: str
    severity: Severity
    sentence: str
    number: int | float | None = None
    cure: str = ""
    term: str = ""
    part: str = ""

    @property
    def is_problem(self) -> bool:
        """A fault or a warning."""
        return self.severity in ("fault", "warning")

    @property
    def text(self) -> str:
        """The sentence and the cure."""
        return f"{self.sentence} {self.cure}".rstrip()


# --- Gradient shares: |lambda_i g_i| / sum_j |lambda_j g_j| in one part of the model -----------------------

# Above this an auxiliary term trains the part almost alone: a warning. A term at a sound share of 0.1 whose
# weight is 100 times too high comes to 0.92.
AUX_SHARE_MAX = 0.9
# Above this a term moves the part more than twice as much as all others together: a hint.
AUX_SHARE_HIGH = 0.7
# Two loud terms keep each other below the shares above, so a term is named from AUX_SHARE_LOUD on where the
# action has less than ACTION_SHARE_MIN (measured: recon and state of the demo, both 100 times too high).
AUX_SHARE_LOUD = 0.3
ACTION_SHARE_MIN = 0.01
# The share that a suggested weight would give: auxiliary terms help at 0.1 to 0.2 of the action's weight.
AUX_SHARE_TARGET = 0.2
# Below this in every part a term changes next to nothing and costs its time all the same ...
AUX_SHARE_MIN = 0.01
# ... and this is the share that is suggested instead.
AUX_SHARE_HELPFUL = 0.1

# --- Conflicts: the cosine of two terms' gradients in one part ---------------------------------------------

# Cosines of unrelated noisy gradients scatter around 0 and are negative half of the time: 8 of 10 and a mean
# below -0.1 are no accident ...
CONFLICT_FRACTION_MIN = 0.8
CONFLICT_COSINE_MAX = -0.1
CONFLICT_STEPS_MIN = 10
# ... and matter only where both terms have a say in the part.
CONFLICT_SHARE_MIN = 0.05

# --- Features ----------------------------------------------------------------------------------------------

# Share of dead units at which width is clearly lost; a few in a hundred are usual with ReLUs.
DEAD_UNITS_MAX = 0.3
# Effective rank below which the features differ in less than one direction and a half: too few to tell where
# anything is. A fresh model has more.
RANK_MIN = 1.5
# With fewer windows a low rank says more of them than of the features: a readout of rank 4 over 64 windows
# had 1.4 over 4.
RANK_LIMIT_MIN = 8

# --- Updates and noise -------------------------------------------------------------------------------------

# |update| / |weights| in which a part learns: at 1e-5 it takes 100,000 steps to change by its own size, at
# 1e-1 ten. The usual figure is 1e-3 (Adam) to 1e-2 (Muon).
UPDATE_RATIO_MIN = 1e-5
UPDATE_RATIO_MAX = 1e-1
# Ratio of noise scale to batch size that leaves no doubt: single estimates scatter by a factor of 2.
NOISE_SCALE_RATIO_MAX = 10.0

# --- Curves ------------------------------------------------------------------------------------------------

# More loss spikes or skipped updates a step than this are no accident of single batches.
SPIKES_PER_STEP_MAX = 1 / 500
# Share of clipped steps at which clipping is no safeguard any more but sets the length of every step ...
CLIPPED_SHARE_MAX = 0.95
# ... and the records that it takes to say so: the first steps of a run are often clipped.
CLIPPED_RECORDS_MIN = 10
# Rise of a held-out term above its minimum that is more than the scatter of a validation ...
OVERFIT_RISE_MAX = 0.1
# ... if the minimum lies this many validations back.
OVERFIT_VALIDATIONS_MIN = 2
# Share of the way from floor to chance: above the first a term has learned nothing yet, below the second it
# has nothing left to teach.
CHANCE_SHARE_MIN = 0.97
FLOOR_SHARE_MAX = 0.02

# --- Probes of a checkpoint --------------------------------------------------------------------------------

# An input that moves the actions by less than this share of their error cannot decide what the robot does:
# the model is wrong by ten times as much anyway.
INPUT_EFFECT_MIN = 0.1
# A baseline within 10 % of the model's error: whatever the model does, that input alone nearly does too.
BASELINE_RATIO_MAX = 1.1

# --- Data --------------------------------------------------------------------------------------------------

# R2 of a linear map from the state to the action: above this the state nearly gives the action away, as
# absolute positions do ...
LEAK_R2_MIN = 0.98
# ... and holds the command itself if one step later this many times more is unexplained.
LEAK_NEXT_STEP_RATIO = 20.0
# Standard deviation of grey levels (of 255) below which a picture shows one colour: black, or a lens cap.
PICTURE_DEVIATION_MIN = 2.0
# Share of frames of one colour above which a camera is useless.
EMPTY_FRAMES_MAX = 0.5
# Share of actions at the smallest or largest value above which they are clipped.
CLIPPED_ACTIONS_MAX = 0.5
# Level of the permutation test of the text: 1 % of data sets with shuffled text pass by chance.
TEXT_P_MAX = 0.01
# Below 16 episodes a permutation test at that level has too little power.
TEXT_EPISODES_MIN = 16
