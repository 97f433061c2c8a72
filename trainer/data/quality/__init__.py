"""Quality of the data: what is dropped, replaced, repeated or split, each with a reason and a count.

Every function here is pure and deterministic. Steps of one row (`missing`, `filters`, `pii`, `augment`, signatures)
run in worker processes; steps over columns (`duplicates`, `split`, `balance`) take arrays with one entry a document.
"""
