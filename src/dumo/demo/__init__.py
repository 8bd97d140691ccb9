"""A page to play with a trained run: what it answers, how that looks, and the server of it."""
