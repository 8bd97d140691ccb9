"""Tests for what you write yourself: `check_objective` checks an objective.

    from dumo.testing import check_objective
    from mine import Robust

    def test_robust():
        check_objective(Robust())

It needs no pytest. `import dumo` does not import this package.
"""

from dumo.testing.check import CheckError, check_objective

__all__ = ["CheckError", "check_objective"]
