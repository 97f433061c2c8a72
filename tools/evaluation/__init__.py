"""How good is a model: questions and answers, held-out text, robustness, side by side with other models.

questions    held-out conversations as prompts with a reference, and the slices they belong to
perturb      the same questions, asked less neatly
generation   greedy answers, many at once
forward      many samples through a model at once
held_out     loss on the supervised tokens of a token store
metrics      per row what a score is made of: exact match, F1, BLEU, chrF, ROUGE, perplexity
intervals    confidence intervals of scores and of differences, by bootstrap
report       all of it for several models, as a table or JSON
harness      task files of lm-evaluation-harness, offline
"""
