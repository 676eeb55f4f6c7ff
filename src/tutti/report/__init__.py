"""A run's records as one self-contained HTML page."""

from tutti.report.page import write_report

__all__ = ["write_report"]
