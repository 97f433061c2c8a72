"""Slice checkpoints: flat slices of every parameter, committed in two phases, readable at any world size.

checkpoints/step-00000100/
    MANIFEST.json                       written last; sizes and hashes of everything below, and of itself
    rank-00000-of-00002.safetensors     flat slices `kind:start:parameter`, and this rank's random state
    state.json                          step, data position, schedule, optimizer step counts
    probe.safetensors                   logits of the live model on pinned prompts: the export is compared to them
    model/                              config.json, tokenizer and chat template: the checkpoint is self-contained
"""
