"""One step, the loop around it, and what is kept between steps.

Owns the files of checkpoints, milestones and the log. Others use `state.begin`, `loop.train`, `step.train_step`,
`checkpoint`, `milestone` and `log`. Knows no net, data or objective by name.
"""
