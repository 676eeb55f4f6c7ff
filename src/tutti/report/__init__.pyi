from .page import write_report
from .tables import Cell, Table, markdown, table

__all__ = [
    "Cell",
    "Table",
    "markdown",
    "table",
    "write_report",
]
