"""Records which kernels Triton compiles."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from triton import knobs


class Compilations:
    """Records the names of the kernels that Triton prepares inside the ``with`` block, one for every specialization.

    A launch that finds its kernel in memory is not recorded.

    Attributes:
        compiled: kernels that went through the compiler.
        cached: kernels that came from Triton's cache on disk.
    """

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.cached: list[str] = []

    def __enter__(self) -> Compilations:
        self._listener = knobs.compilation.listener
        knobs.compilation.listener = self._record
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        knobs.compilation.listener = self._listener

    @property
    def names(self) -> list[str]:
        """The names of all prepared kernels."""
        return self.compiled + self.cached

    def _record(self, *, src: Any, cache_hit: bool, **rest: Any) -> None:
        (self.cached if cache_hit else self.compiled).append(src.name)
        if self._listener is not None:
            self._listener(src=src, cache_hit=cache_hit, **rest)
