"""Evaluation on a token store while training."""
