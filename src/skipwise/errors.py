"""Errors that a user can mend."""


class SkipwiseError(Exception):
    """What was given, why it fails, what to type: one to three lines, shown without a trace."""
