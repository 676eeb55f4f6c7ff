from .config import LabelsConfig, SourceConfig, rate_of
from .parts import (
    Part,
    check_compatible,
    check_lengths,
    labelled_rows,
    masked_line,
    open_parts,
    robots,
    slots,
    split_parts,
    stores_of,
    training_texts,
    used_vectors,
)
from .shares import SourceShare, source_shares, weighed
from .statistics import fit_normalizer, training_answers

__all__ = [
    "LabelsConfig",
    "Part",
    "SourceConfig",
    "SourceShare",
    "check_compatible",
    "check_lengths",
    "fit_normalizer",
    "labelled_rows",
    "masked_line",
    "open_parts",
    "rate_of",
    "robots",
    "slots",
    "source_shares",
    "split_parts",
    "stores_of",
    "training_answers",
    "training_texts",
    "used_vectors",
    "weighed",
]
