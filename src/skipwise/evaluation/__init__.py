"""Evaluation of any transformers causal language model: nothing here knows how it was trained."""
