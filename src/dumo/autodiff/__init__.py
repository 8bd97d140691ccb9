"""Dual numbers: a tangent rides along with each tensor through a net. The number, its rules, attention's tangent.

Touches tensors. Knows no net, no objective and no run.
"""
