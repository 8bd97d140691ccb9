"""The mathematics of flows: what a loss reads, how du/dt is taken, and how a trained net is sampled.

- A training step: `noise` draws times (`times`) and noise, and puts data on a `path`; a loss takes du/dt by a `slope`,
  guides its target by `guide`, and measures a `residual`.
- Samples: `reading` says what a trained network tells a `solver`, and `sampling` runs it in batches.
- `module` has `Flow`, which joins all of it with a network; `adapter` calls networks of users, `trainable` and
  `derivative` check them, and `compatibility` refuses what does not go together.

Touches tensors, and no file. Knows no net and no data; of objectives it knows names, in messages alone.
"""
