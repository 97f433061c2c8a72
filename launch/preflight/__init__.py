"""Is this host, and are these hosts together, fit to train? Facts first, then a pure judgement of them.

    facts     what one host is: versions, cores, memory, limits, disks, GPUs; no torch is imported
    expect    what the run will want of it: code and configuration hashes, size of a checkpoint, time left
    judge_*   facts -> findings (ok, warning, error), each a fact and a remedy; pure
    meeting   how ranks tell rank 0 their facts over MASTER_PORT, within a bound
    mailbox   the same through run.dir, which shows whether it is shared, and tells who could not come
    probe     a child process that does the first collectives: gloo, then NCCL
    watch     the ranks of a preflight, started by a launcher: rank 0 speaks for all

`steadfast doctor` is the first three for this machine; `steadfast preflight CONFIG` is all of them.
"""
