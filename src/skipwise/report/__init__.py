"""A run folder's JSON to tables, figures and one self-contained page; never loads torch."""

from skipwise.report.page import write_report
from skipwise.report.plots import plot_positions
from skipwise.report.tables import format_table, headline

__all__ = ["format_table", "headline", "plot_positions", "write_report"]
