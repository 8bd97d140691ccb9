"""JVP rules for torch operations on Duals. Importing this package registers them.

The rule of an operation f

1. computes f on the primals of its operands (`primal`), by the same call as the network;
2. names the JVP of f, a function of the operands' tangents (None for an operand without one) and of other arguments.
   `_jvp_gelu(dx, x, approximate)` is the derivative of gelu at x along dx. A linear f is its own JVP;
3. passes the value, the JVP, the operands and the other arguments to `carry`, which calls the JVP now or later.

A JVP is a module-level function without a closure, because it may be stored for later. Autograd must be able to
differentiate it, for losses that contain the derivative (`Dual.recorded`); otherwise it runs without gradients.

In rules, `a_` is the primal of `a`, and `da` its tangent. Docstrings give the derivative. Parameters have torch's
names, because networks pass them by name. To add an operation, write its rule in one of these files, decorated with the
torch functions that call it.
"""

from dumo.autodiff.rule import algebra as algebra
from dumo.autodiff.rule import layer as layer
from dumo.autodiff.rule import shape as shape
