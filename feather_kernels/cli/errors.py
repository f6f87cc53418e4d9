"""The error that a user can mend."""


class InputError(ValueError):
    """An option, a file or a folder is not what it should be; the message names it, the value and what was expected.

    The command line prints the message as one line and exits with 2. Every other ValueError is a bug and is not caught.
    """
