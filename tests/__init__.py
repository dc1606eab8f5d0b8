"""Tests of `rredcot_verl` and its recipes."""

# Seconds until what a test waits for counts as hanging; machines differ, and much else may run on them.
PATIENCE_S = 1800
