"""Models: transformers directories in, a loss over supervised positions out."""
