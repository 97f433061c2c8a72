"""Model directories, as `steadfast export` makes them and other tools bring them.

writing   built aside, hashed while written, given their name when complete; the manifest
loading   configuration, tokenizer and model, plain or int8; hostile files are refused
tensors   their weights, piece by piece, and whether they are all there
pieces    how weights are cut, cast and looked at on their way to a file
int8      our own weight-only format
chat      messages to token ids and back, and where an answer ends
card      the README.md that says what was shown
signing   signatures, with a key and offline
"""
