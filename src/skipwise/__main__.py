"""`python -m skipwise`: the command line, as launchers start it."""

import sys

from skipwise.cli import main

sys.exit(main())
