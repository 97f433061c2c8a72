"""What `steadfast export` is made of.

checkpoint_tensors  the tensors of a slice checkpoint, named and shaped as its architecture says
adapter             those of a LoRA run: merged into the base, or apart in the format of peft
proof               what a fresh process compares before the model appears
"""
