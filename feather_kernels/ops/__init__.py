"""The ops of the package, as ``torch.ops.feather_kernels``: defined in Python, so they exist without a compiler.

``schema.py`` is the contract, ``implementations.py`` what runs, ``dispatch.py`` the choice of the backend,
``no_derivative.py`` the error where a gradient would be lost, ``onnx_export.py`` that of an export to ONNX,
``call_record.py`` which thresholds were used.
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
