from .config import LabelsConfig, SourceConfig, rate_of
from .parts import (
    Labelled,
    Part,
    check_compatible,
    check_lengths,
    labelled_rows,
    open_parts,
    robots,
    slots,
    split_parts,
    stores_of,
    used_vectors,
)
from .shares import SourceShare, masked_line, source_shares, weighed
from .statistics import fit_normalizer, training_answers, training_texts
from .unchanged import check_unchanged

__all__ = [
    "Labelled",
    "LabelsConfig",
    "Part",
    "SourceConfig",
    "SourceShare",
    "check_compatible",
    "check_lengths",
    "check_unchanged",
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
