"""One step, the loop around it, and what is kept between steps.

Touches ranks, checkpoints and the log. Knows no net, no data and no objective by name.
"""
