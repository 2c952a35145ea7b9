"""A folder's JSON to tables, figures and one self-contained page; never loads torch.

Reading order:  rows.py (the format)  ruler.py, benchmarks.py (what is summed up)
                tables.py (rows to a table)  verdict.py (rows to a sentence)
                plots.py (figures)  words.py (figures for those who do not see them)
                page.py (all of it on one page)  compare.py (several runs on one page)
"""

from skipwise.report.figures.positions import plot_positions
from skipwise.report.page.compare import compare_runs
from skipwise.report.page.page import write_report
from skipwise.report.tables import format_table

__all__ = ["compare_runs", "format_table", "plot_positions", "write_report"]
