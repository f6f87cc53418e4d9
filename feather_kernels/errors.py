"""Exceptions and warnings of the package; wrong arguments raise ValueError or TypeError."""


class BackendUnavailableError(RuntimeError):
    """A backend that was requested by name cannot run here; the message says why each backend is unavailable.

    Example:
        >>> with fk.use_backend("cuda"):
        ...     fk.functional.threshold(torch.randn(4), 0.5)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        feather_kernels.errors.BackendUnavailableError: backend 'cuda' cannot run on cpu. Probed: cuda: ...
    """


class SparsityWarning(UserWarning):
    """Part of a model trains dense, or the model is or will be less sparse than requested.

    Example:
        >>> import warnings
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        >>> sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=10)
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", fk.SparsityWarning)
        ...     model = sparsifier.finalize()  # no step() was called
        >>> str(caught[0].message)  # doctest: +ELLIPSIS
        'the sparsifier has counted 0 steps, and its schedule ends at step 5: ...'
    """
