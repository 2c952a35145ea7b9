"""Models: reading, rescaling, converting and loading them."""
