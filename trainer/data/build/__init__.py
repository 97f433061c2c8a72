"""From inputs to a token store: a recipe, parts made by worker processes, decisions over all rows, shards and plan.

recipe     everything that decides the content      run        the build, read aloud
row_steps  what happens to a single row             parts      a chunk of input to a part on disk
pool       parts in worker processes                work       finished parts outlive a kill
decide     duplicates, splits, balance              gather     parts to shards, plan, manifest
report     what became of every row
"""
