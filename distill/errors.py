"""The errors that are the user's: what was given, what was expected, what to do.

Everything in ``distill`` that refuses an input raises one of these, before any compute is spent. A command ends with
exit code 2 and the message alone for them, and with 1 for every other exception: those are faults of the library or of
the machine (``distill/cli.py``).
"""


class UserError(ValueError):
    """An input that cannot be used: a file, a configuration, an array's shape.

    Example:
        >>> from distill.errors import UserError
        >>> from distill.training import TrainingConfig
        >>> try:
        ...     TrainingConfig(steps=0)
        ... except UserError as error:
        ...     print(error)
        training: steps=0; expected at least 1.
    """


class MissingFile(UserError, FileNotFoundError):
    """A file or folder that is needed and not there."""
