"""From a trace to its probes, and from the probes to self-values: who reads which log-probabilities."""
