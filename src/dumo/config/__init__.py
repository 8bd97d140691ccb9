"""What a run is, as a value: specs in, specs out, and every mistake named before any work."""
