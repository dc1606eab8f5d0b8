"""The trainer's process: from records to values, credit, metrics and traces."""
