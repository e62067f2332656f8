"""The order of events, and nothing else."""
