"""Checks that find what would waste a run, before its first step."""
