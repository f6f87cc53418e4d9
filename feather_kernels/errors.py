"""Exceptions and warnings of the package; argument errors are ValueError and TypeError."""


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run here; the message lists what every probe said."""


class SparsityWarning(UserWarning):
    """Part of a model trains dense, or the model is or will be less sparse than asked."""
