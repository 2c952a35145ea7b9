"""Text to token ids, documents, examples and batches.

Reading order:  readers, shards, tokenize, token_cache; corpus, dataset, collator
"""
