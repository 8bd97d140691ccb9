"""Forward-mode differentiation with dual numbers: each tensor in a network carries its tangent.

- `dual` defines the dual number, `rule` the JVP of each operation, and `fallback` the operations without a rule.
- `tape` computes tangents after the pass, for directions that are not known before it.
- `attention` and `kernel` compute the tangent of softmax attention.
- `jvp` is the public `dumo.jvp`; `float64` computes the reference derivative for checks.

This package works on tensors and does not depend on networks, objectives or runs.
"""
