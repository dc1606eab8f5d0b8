"""Values from a process reward model: an example of a source of one's own."""
