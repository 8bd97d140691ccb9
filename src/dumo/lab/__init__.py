"""Many runs: a plan's arms trained at equal cost, figures and tables of their results, and the time of a training step.

`reproduce.reproduce` runs a plan and `bench.measure` times a step. Only the command line calls this subpackage.
"""
