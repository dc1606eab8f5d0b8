"""The method's maths: pure functions on torch tensors. Imports torch and nothing else."""
