"""Comparisons of Steadfast's data path with other tools, each a file; `tools.bench` is the command."""
