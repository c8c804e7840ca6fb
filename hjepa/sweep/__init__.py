"""Many runs: planned, run in slots on this machine or on SLURM, and compared in a table and a plot."""
