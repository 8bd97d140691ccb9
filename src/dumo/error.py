"""The error of what a user gave. It has a file of its own, without torch, so that a mistake is answered at once."""


class UserError(ValueError):
    """What the user gave is wrong. The message names the thing and the way out; the command line exits with 2."""


class NotFiniteError(UserError):
    """Samples or likelihoods that are to be judged are not finite numbers: the weights have diverged."""
