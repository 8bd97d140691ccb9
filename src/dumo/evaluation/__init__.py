"""How runs are judged: an evaluation with its report card, sweeps of one field, and comparisons of like with like."""
