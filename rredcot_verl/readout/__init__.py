"""Regression of verified outcomes on what is known of a state. Torch only."""
