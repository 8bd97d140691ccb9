"""A run measured: scores, cards, sweeps, benchmarks of prompts."""
