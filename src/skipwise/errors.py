"""Errors that a user can mend."""


class SkipwiseError(Exception):
    """What was given, why it fails, what to type: one to three lines, shown without a trace."""


class RunStopped(SkipwiseError):
    """The user stopped the run; it was saved and goes on when the command is typed again."""
