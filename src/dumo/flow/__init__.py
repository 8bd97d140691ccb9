"""The mathematics of flows: what a loss reads, how du/dt is taken, and how a trained net is sampled.

- A training step: `draw` draws times (`times`) and noise, and puts data on a `path`; a loss takes du/dt by a `slope`,
  guides its target by `guide`, and measures a `residual`.
- Samples: `reading` says what a trained net tells a `solver`, and `generate` runs it in batches.
- For one net, all of it together: `flow`; in a training loop of a user's, `loop`, which is `dumo.Flow`.

Touches tensors, and no file. Knows no net and no data; of objectives it knows names, in messages alone.
"""
