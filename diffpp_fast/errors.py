"""Errors that arise through no fault of the program: said in a sentence, without a traceback."""


class UserError(Exception):
    """The run can't go on as it was asked for; the message names what is wrong and, where there is one, the remedy."""

    #: Of the program that it ends.
    exit_code = 2


class ConfigurationError(UserError):
    """A key, a file or a combination of networks that the run can't use."""


class CheckpointError(UserError):
    """A checkpoint that can't be written or read."""


class NonFiniteError(UserError):
    """A loss, a gradient or a reward that is NaN or infinite. No weight has been touched by it."""
