"""The mathematics of flows: paths, times, du/dt, guidance and solvers.

- Training: `noise` draws times (`times`) and noise, and makes noisy batches on a `path`; a loss computes du/dt with a
  `slope`, guides its target with a `guide`, and measures a `residual`.
- Sampling: `reading` defines what an objective's network provides to a `solver`, and `sampling` runs it in batches.
- `module` defines `Flow`, which combines these with a network; `adapter` calls a user's network, `trainable` and
  `derivative` check it, and `compatibility` refuses invalid combinations.

This package works on tensors and opens no files. It does not depend on networks, data or objectives.
"""
