"""Quickstart: a small model, a task whose wrong lines are known, RREDCoT against GRPO on the CPU."""
