"""Tangent rules: for every operation, how a small change of its inputs changes its output.

A rule computes the primal by the very call that the net made, and hands `carry` a function that moves the tangent:
`_gelu(dx, x)` is the change of gelu at x for a change dx. These functions are of their module and take all they need as
arguments, so that they can be kept as data and run later. Where an operation is linear, it moves its own tangent. They
run without gradients, but with them where a loss holds the derivative itself (`Dual.recorded`): so what
they take must then be what autograd can follow, and what they do, too.

To add an operation: write its rule in one of these files, decorated with the functions of torch that a net calls it by.
"""

from dumo.autodiff.rule import algebra as algebra
from dumo.autodiff.rule import layer as layer
from dumo.autodiff.rule import shape as shape
