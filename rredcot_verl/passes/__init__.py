"""Passes of the training engine that read probes, hidden states or attributions, and the engine that runs them."""
