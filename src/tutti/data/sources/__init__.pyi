from .config import LabelsConfig, SourceConfig
from .parts import (
    Part,
    check_compatible,
    labelled_rows,
    open_parts,
    robots,
    slots,
    split_parts,
    stores_of,
    used_vectors,
)

__all__ = [
    "LabelsConfig",
    "Part",
    "SourceConfig",
    "check_compatible",
    "labelled_rows",
    "open_parts",
    "robots",
    "slots",
    "split_parts",
    "stores_of",
    "used_vectors",
]
