"""Defines the ops of the package, ``torch.ops.feather_kernels``, in Python, so that they exist without a compiler.

- ``schema.py``: the contract of each op: its schema, its checks and the allocation of its result
- ``implementations.py``: the functions that run, which call a backend
- ``no_derivative.py``: the error that an op raises instead of losing a gradient
- ``onnx_export.py``: the error that an op raises in an export to ONNX
- ``call_record.py``: records the thresholds that were used
"""

import torch

from feather_kernels.ops import implementations, schema
from feather_kernels.ops.no_derivative import without_derivative
from feather_kernels.ops.onnx_export import not_in_onnx

INTEGER_RESULT = ("magnitude_histogram", "count_pruned")  # nothing to differentiate

_library = torch.library.Library(schema.NAMESPACE, "DEF")
for _name, _op in schema.OPS.items():
    _run = getattr(implementations, _name.replace(".", "_"))
    _library.define(_op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _run = _run if _name in INTEGER_RESULT else without_derivative(_name, _run)
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{schema.NAMESPACE}::{_name}", not_in_onnx(_op.fake), lib=_library)
