"""Rollout servers that read the probes of a trace: subclasses of verl's own servers."""
