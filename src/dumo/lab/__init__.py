"""Many runs: arms at equal cost, figures, tables and times, made again.

Touches a folder of its own, and processes. The library does without it.
"""
