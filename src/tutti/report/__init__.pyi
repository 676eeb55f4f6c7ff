from .blocks import Cell, Table, markdown, table
from .page import write_report

__all__ = [
    "Cell",
    "Table",
    "markdown",
    "table",
    "write_report",
]
