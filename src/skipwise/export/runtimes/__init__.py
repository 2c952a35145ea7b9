"""What each runtime would load from a model's folder, ours or not, and where they differ.

A config.json is enough; neither torch nor transformers is imported.

1. `folder.py` reads the files, 2. `runtimes.py` says what each runtime makes of them,
3. `faults.py` and `file_faults.py` compare (on a `case.py`), 4. `table.py` prints.
"""

from skipwise.export.runtimes.folder_report import Issue
from skipwise.export.runtimes.readers import Reading
from skipwise.export.runtimes.table import Verdict, as_json, format_verdict, verify_folder

__all__ = ["Issue", "Reading", "Verdict", "as_json", "format_verdict", "verify_folder"]
