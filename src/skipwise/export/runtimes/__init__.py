"""What each runtime would load from any model's folder, and where runtimes differ.

A config.json is enough; neither torch nor transformers is imported.

1. `folder.py` reads the files, 2. `readers.py` says what each runtime makes of them,
3. `config_issues.py` and `file_issues.py` compare (a `FolderReport`), 4. `table.py` prints.
`own_export.py` asks the same of what a run writes.
"""

from skipwise.export.runtimes.folder_report import Issue
from skipwise.export.runtimes.own_export import check_export
from skipwise.export.runtimes.readers import Reading
from skipwise.export.runtimes.table import Verdict, as_json, format_verdict, verify_folder

__all__ = [
    "Issue",
    "Reading",
    "Verdict",
    "as_json",
    "check_export",
    "format_verdict",
    "verify_folder",
]
