"""The quickstart: a bundled base model of 256 tokens, extended to 2,048 on the text at hand."""
