"""A run before it is run: what it takes, counted, and one real step of it, timed. No data or codec's weights needed."""
