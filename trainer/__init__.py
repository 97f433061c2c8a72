"""Steadfast's training side: from configuration and raw text to committed checkpoints."""
