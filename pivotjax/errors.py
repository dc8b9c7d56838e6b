"""The one exception for bad input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what is wrong, where, and what to do about it. The command line prints it
    and exits with status 2; anything else that escapes is a bug and shows its traceback.
    """
