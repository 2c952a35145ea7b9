"""Turns a folder's JSON into tables, figures and one self-contained page; never loads torch.

Reading order:  load.py (files to rows)  rows.py (the row format)  format.py (numbers to text)
                ruler.py, benchmarks.py (summaries)  tables.py (rows to a table)
                headline.py (rows to a sentence)  figures/ (curves, heat maps, their alt text)
                page/page.py (the page of a run or evaluation)  page/compare.py (of several)
"""

from skipwise.report.figures.positions import plot_positions
from skipwise.report.page.compare import compare_runs
from skipwise.report.page.page import verdict, write_report
from skipwise.report.tables import format_table

__all__ = ["compare_runs", "format_table", "plot_positions", "verdict", "write_report"]
