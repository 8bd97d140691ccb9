"""Experiments of many runs: train the arms of a plan at equal cost, tabulate and plot the results, time training steps.

`reproduce.reproduce` runs a plan and `bench.measure` times a step. Only the command line uses this subpackage.
"""
