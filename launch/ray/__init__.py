"""Ray: `submit` and `place` at the user's end (the job API), `run` in the cluster, `hosts` on every node.

Ray gives us nodes and carries messages; it does not run the training. One host actor a node starts ordinary rank
processes, the same ones as on a single machine, and the driver watches them with the supervisor that local runs have.
So a crash of a rank takes no Ray worker along, signals and exit codes are ours, and nothing of the training is pickled.

`steadfast launch ray` with the address of a job API (http://...) submits a job; with any other address, or inside a
job, it is the driver itself. Whoever reaches the API of a cluster without tokens can run anything on it: such clusters
are refused, and those we start ask for a token.
"""
