"""The engine: DeepSpeed ZeRO behind one small protocol; device differences live in `device` alone."""
