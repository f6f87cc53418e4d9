"""A dispatch mode that forbids reading a tensor on the host, inside our own ops too."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from feather_kernels.ops import implementations

HOST_READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "bincount",
}


class NoHostRead(TorchDispatchMode):
    """Raises on ops that read values on the host or have a result whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "feather_kernels":  # look inside: run its implementation with this mode on again
            name = func._schema.name.split("::")[1]
            name += f".{func._schema.overload_name}" if func._schema.overload_name else ""
            with self:
                return getattr(implementations, name.replace(".", "_"))(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.ops.add(name)
        if name in HOST_READS:
            raise AssertionError(f"{func} reads a tensor on the host")
        if name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
            for argument in args
            if isinstance(argument, (list, tuple))
            for index in argument
        ):
            raise AssertionError(f"{func} with a boolean index reads its count on the host")
        return func(*args, **kwargs)
