"""RREDCoT for verl: segment-level reward redistribution for reasoning traces."""

__version__ = "0.1.0"
