from .ranks import Ranks, gathered, mean_over_ranks, sample_whole_batch, shared_mean
from .world import World, process_group

__all__ = [
    "Ranks",
    "World",
    "gathered",
    "mean_over_ranks",
    "process_group",
    "sample_whole_batch",
    "shared_mean",
]
