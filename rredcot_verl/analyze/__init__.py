"""The bench: which credit is right, on the user's own model and traces. `python -m rredcot_verl.analyze --help`."""
