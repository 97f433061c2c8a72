"""A token store in the formats of other tools: Parquet, a `datasets` directory, Megatron's .bin and .idx.

Every document becomes one row with `input_ids` and `labels` (-100 where nothing is supervised, not shifted, as
transformers wants them). Megatron's format knows no loss mask: it gets a second pair of files with one byte a token.
The other direction is `steadfast data build`: it reads Parquet with input_ids and Megatron files like any input.
"""

from trainer.data.store.interop.export import export_store

__all__ = ["export_store"]
