"""A run before it is run: what it is, what it takes, one real step of it, and whether its derivative is one here."""
