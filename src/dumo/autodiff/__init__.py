"""Dual numbers: a tangent is carried along with each tensor through a net, which gives its derivative exactly.

- `dual` has the number, `rule` what each operation does to its tangent, `general` the operations without a rule.
- `tape` computes tangents after the pass, where the direction is known only then.
- `attention` and `kernel` have the tangent of softmax attention.
- `jvp` is the public `dumo.jvp`; `float64` is the exact derivative that others are compared with.

Touches tensors. Knows no net, no objective and no run.
"""
