"""One number each, from a model and plain data."""
