"""Errors of a pass of Duals: `NoRule` for an operation without a tangent, `WrittenTo` for a tape that went stale."""

from dumo.types import UserError


class NoRule(UserError, NotImplementedError):  # noqa: N818, a lack in the rules
    """A net uses an operation, named by the argument, for which there is no tangent."""

    def __str__(self) -> str:
        """The name and the way out. Not made by the constructor, which a compiler could not trace."""
        return (
            f"slope 'dual' has no tangent for '{self.args[0]}', which this net uses: use slope 'jvp', or another "
            "operation"
        )


class WrittenTo(UserError, RuntimeError):  # noqa: N818, as NoRule
    """A tensor that a tape needs has been written to before the tape played; the argument names the rule."""

    def __str__(self) -> str:
        """What happened and the way out."""
        return (
            f"slope 'dual' cannot play its tape: this net has written in place to a tensor that '{self.args[0]}' "
            "needs as it was. Write to a clone of it, or use slope 'jvp'"
        )
