"""The parts of a training: optimizers, averages, checkpoints, the log, and how a batch is split.

`dumo.run.trainer` puts them together. Knows no network, data or objective by name.
"""
