"""Derivatives of nets by dual numbers, exact in any precision: the number, its rules, and attention's tangent."""
