"""Models: what a config says, how it is scaled and loaded, and the checks before a run."""
