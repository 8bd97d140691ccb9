"""The mathematics: paths, distributions of times, derivatives along the flow, guidance, solvers, what a loss is shown.

Touches tensors, and no file. Knows no net, no data and no objective by name.
"""
