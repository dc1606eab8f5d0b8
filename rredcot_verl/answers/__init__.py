"""The grammar of answers: formats, thinking, where an answer starts; for probes, verifiers and data."""
