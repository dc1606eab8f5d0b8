"""Data for verl: known data sets to parquet in verl's schema, without repetitions, with a manifest."""
