"""Slice checkpoints: flat slices of every parameter, committed in two phases, readable at any world size.

checkpoints/step-00000100/
    MANIFEST.json                       written last; sizes and hashes of everything below, and of itself
    rank-00000-of-00002.safetensors     flat slices `kind:start:parameter`, and this rank's random state
    state.json                          step, data position, schedule, optimizer step counts
    probe.safetensors                   logits of the live model on some prompts: the export is compared to them
    model/                              config.json, tokenizer and chat template: the checkpoint is self-contained
checkpoints/step-00000100.pinned        empty: retention never removes that checkpoint
checkpoints/latest                      a hint for people; no reader trusts it

capture (what a live run consists of) -> contents (as files) -> saving (when, and what happens when it fails)
-> writer_process (hash, write, sync beside the run) -> commit (the protocol) -> retention, upload; verify, slices and
resume read.
"""
