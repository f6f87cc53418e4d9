"""What each PTX instruction does, grouped as in the PTX ISA manual."""

from ptx.instructions import (
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
from ptx.instructions.registry import Rule, link

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
