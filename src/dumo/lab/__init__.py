"""Many runs: arms at equal cost, figures, tables and times, made again.

The entrances: `reproduce.reproduce` runs a plan; `step_bench.measure`, `sample_bench.measure` and `data_bench.measure`
time steps, samples and data.

Touches a folder of its own, and processes. The library does without it.
"""
