"""Errors in a user's input. This file does not import torch, so that the command line reports mistakes at once."""


class UserError(ValueError):
    """The user's input is wrong. The message has the value, the rule and the fix; the command line exits with 2."""


class NotFiniteError(UserError):
    """Samples or likelihoods to be evaluated are not finite, because the weights have diverged."""
