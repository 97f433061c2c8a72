"""Data: raw files to token stores, token stores to the micro-batches of every step."""
