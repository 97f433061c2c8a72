"""Slurm: `submit` on the login node, `job` in the batch step, `task` beside every rank, `srun` between those two.

sbatch starts slurm/sft.sh, which becomes `steadfast launch slurm-job`. That starts one srun, whose tasks are
`steadfast launch slurm-task`, one a rank; each starts its rank as an ordinary child, so that somebody is there to say
how it ended. The job watches all of them with the supervisor that local runs have, decides what follows, and requeues
itself.
"""
