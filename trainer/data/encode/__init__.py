"""From records to token ids and an exact loss mask.

tokenizer           load and fingerprint            rendering       the chat template, bounded
templates           records to ids and spans        control_tokens  text of the data never becomes one
fast_tokenizer      a twin with equal ids           sentencepiece_model, tokenizer_training
"""
