"""`python -m skipwise`, which launchers start."""

import sys

from skipwise.cli import main

sys.exit(main())
