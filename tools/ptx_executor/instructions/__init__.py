"""What each PTX instruction does, grouped as in the PTX ISA manual."""

from tools.ptx_executor.instructions import (
    approximate,
    atomic,
    comparison,
    control,
    conversion,
    floating,
    integer,
    matrix,
    movement,
    warp,
)
from tools.ptx_executor.instructions.registry import Rule, link

__all__ = [
    "Rule",
    "approximate",
    "atomic",
    "comparison",
    "control",
    "conversion",
    "floating",
    "integer",
    "link",
    "matrix",
    "movement",
    "warp",
]
