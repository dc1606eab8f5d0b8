"""A run's settings held against verl's config, before any worker is started."""
