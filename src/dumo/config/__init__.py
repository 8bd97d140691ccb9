"""A run as one tree of values, read from YAML and checked."""
