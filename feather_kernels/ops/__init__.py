"""The ops of the package, as ``torch.ops.feather_kernels``: defined in Python, so they exist without a compiler.

``schema.py`` is the contract, ``eager.py`` what runs, ``dispatch.py`` the choice of the backend.
"""

import torch

from feather_kernels.ops import eager, schema

_library = torch.library.Library(schema.NAMESPACE, "DEF")
for _name, _op in schema.OPS.items():
    _library.define(_op.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, eager.IMPLEMENTATIONS[_name], "CompositeExplicitAutograd")
    if _name not in eager.INTEGER_RESULT:
        _library.impl(_name, eager.refuse_gradients(_name), "Autograd", with_keyset=True)
    torch.library.register_fake(f"{schema.NAMESPACE}::{_name}", _op.fake, lib=_library)
