"""What Triton compiled, kernel by kernel."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from triton import knobs


class Compilations:
    """Names of the kernels that Triton made ready inside the ``with`` block, one for every specialisation.

    ``compiled`` went through the compiler, ``cached`` came from Triton's cache on disk. A launch that finds its
    kernel in memory counts for neither.
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
        """All of them."""
        return self.compiled + self.cached

    def _record(self, *, src: Any, cache_hit: bool, **rest: Any) -> None:
        (self.cached if cache_hit else self.compiled).append(src.name)
        if self._listener is not None:
            self._listener(src=src, cache_hit=cache_hit, **rest)
