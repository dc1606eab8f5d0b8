"""Hydra overlays (`--config-path pkg://rredcot_verl.config`) and the schema of `algorithm.rredcot`."""
