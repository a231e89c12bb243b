"""Ways to run an op: one file per kernel, one table of them, one function that chooses."""
