"""Rollout servers that score the probes of a trace: subclasses of verl's own servers."""
