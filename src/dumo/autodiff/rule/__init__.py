"""Tangent rules: for every operation, how a small change of its inputs changes its output.

A rule of an operation f does three things, in this order:

1. It takes the primals of its operands (`primal`) and makes f's value by the very call of the net.
2. It names the push of f: a function of the operands' tangents, None for those that rest, and of what else it needs.
   `_push_gelu(dx, x, approximate)` is the change of gelu at x for a change dx. A linear f pushes its own tangent.
3. It hands value, push, operands and the push's other arguments to `carry`, which calls the push now or later.

A push is a function of its module and closes over nothing, because a tape keeps it as data. It runs without gradients;
but with them where a loss holds the derivative itself (`Dual.recorded`), so autograd must be able to follow it.

In rules, `a_` is the primal of `a`, and `da` its tangent. Docstrings give the derivative. Parameters have torch's own
names, because nets pass them by name. To add an operation: write its rule in one of these files, decorated with the
functions of torch that nets call it by. Other packages import nothing from here; to import the package registers all.
"""

from dumo.autodiff.rule import algebra as algebra
from dumo.autodiff.rule import layer as layer
from dumo.autodiff.rule import shape as shape
