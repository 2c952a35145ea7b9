"""Attention with key weights, masks of hybrid models, and the attention temperature."""
