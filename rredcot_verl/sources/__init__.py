"""Where the values of segments come from: one object a source."""
