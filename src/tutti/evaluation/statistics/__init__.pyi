from .comparison import Comparison, compare_arms, holm, paired_difference, seeds_needed
from .intervals import (
    Difference,
    Estimate,
    Interval,
    mcnemar,
    mean_of_rates,
    paired_episodes_needed,
    paired_interval,
    ratio_of_sums,
    seeds_and_starts,
    t_interval,
    wilson,
)

__all__ = [
    "Comparison",
    "Difference",
    "Estimate",
    "Interval",
    "compare_arms",
    "holm",
    "mcnemar",
    "mean_of_rates",
    "paired_difference",
    "paired_episodes_needed",
    "paired_interval",
    "ratio_of_sums",
    "seeds_and_starts",
    "seeds_needed",
    "t_interval",
    "wilson",
]
