"""Smaller models and what they lost.

schemes       what there is to choose, and what each needs
texts         token ids to calibrate and to compare on: stores, JSONL, plain text
weight_only   int8 of our own: nothing else needed
environment   the environment that llm-compressor gets for itself
compressed    its schemes, and pruning, asked for from here
worker        what runs in that environment
gguf          llama.cpp's converter
quality       how close the smaller model is to its original
"""
