"""The error for mistakes that a user can fix."""


class InputError(ValueError):
    """A wrong option, file or folder; the message names it, its value and what was expected.

    The command line prints the message on one line and exits with code 2. Other ValueErrors are bugs
    and keep their traceback.
    """
