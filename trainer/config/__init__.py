"""Configuration as data: the schema, the loader that finds every problem at once, and DeepSpeed's JSON."""
