"""The token store: a directory of immutable files that training reads by memory map.

    OUT/manifest-00000001.json            written last: counts, checksums, sources, tokenizer fingerprint, its own hash
    OUT/tokens/tok-<number>-<xxh3>.safetensors
        ids               uint16 or uint32 [tokens]     all documents, flat
        document_offsets  uint64 [documents + 1]        where each begins in ids
        loss_spans        uint32 [spans, 2]             supervised (start, stop), relative to the document
        span_offsets      uint64 [documents + 1]        where each document's spans begin
        document_hash     uint64 [documents]            xxh3 of ids and spans; what `diff` compares
        turn_ends         uint32 [turns]                where a turn of the assistant ended, relative to the document
        turn_offsets      uint64 [documents + 1]        where each document's ends of turns begin
        head              uint32 [documents]            tokens of the pinned head (system prompt, instruction); 0: none
        source            uint16 [documents]            index into manifest["sources"]
        file, line        uint32 [documents]            index into manifest["inputs"], line of the row
        label             int32 [documents]             index into manifest["labels"], -1: none
    OUT/plans/plan-<every setting>.safetensors          the arrays of `packing.RowPlan`
    OUT/tokenizer/                        copy of the tokenizer, so the store is complete by itself
    OUT/reports/left_out.jsonl            rows that were left out and duplicates: place and reason
    OUT/reports/quarantine.jsonl          bad rows with their bytes, where the recipe asks for it

Writing is in `build`, reading in `reader`, from a URL through `remote`.
"""

from trainer.data.store.reader import TokenStore, VerifyReport, open_store, reading, verify_store

__all__ = ["TokenStore", "VerifyReport", "open_store", "reading", "verify_store"]
