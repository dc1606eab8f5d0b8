"""Tests of `rredcot_verl` and its recipes."""

# Seconds until what a test waits for counts as hanging: no test says how fast something is.
PATIENCE_S = 1800
