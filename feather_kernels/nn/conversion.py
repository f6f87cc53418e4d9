"""Swaps the class of a dense layer for a sparse one, and back.

A layer is extended in one of three forms:

- "forward": a class of ours replaces torch's forward. For linear layers and convolutions, and for subclasses that keep
  torch's forward.
- "recurrent": forward exchanges the list of weights. For LSTM, GRU, RNN and their subclasses.
- "attribute": attributes return P of the parameter. For attention and for any other module.

The classes of torch have sparse classes of their own; those of subclasses are made when they are needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from feather_kernels.nn import convolution, linear, recurrent
from feather_kernels.nn.attention import FeatherMultiheadAttention
from feather_kernels.nn.base import LayerState, SparseLayer
from feather_kernels.nn.dtensor import local_part
from feather_kernels.nn.weight_attribute import AttributeLayer, thresholded

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import ThresholdBinding

TORCH = "torch.nn"  # torch.fx does not trace into modules that claim to be torch's; a trace would freeze P(weight)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
# pruned by default, as the recurrent layers are
LINEAR_AND_CONVOLUTION: dict[type[nn.Module], type[SparseLayer]] = {
    nn.Linear: linear.FeatherLinear,
    nn.Conv1d: convolution.FeatherConv1d,
    nn.Conv2d: convolution.FeatherConv2d,
    nn.Conv3d: convolution.FeatherConv3d,
    nn.ConvTranspose1d: convolution.FeatherConvTranspose1d,
    nn.ConvTranspose2d: convolution.FeatherConvTranspose2d,
    nn.ConvTranspose3d: convolution.FeatherConvTranspose3d,
}
RECURRENT: dict[type[nn.Module], type[SparseLayer]] = {
    nn.LSTM: recurrent.FeatherLSTM,
    nn.GRU: recurrent.FeatherGRU,
    nn.RNN: recurrent.FeatherRNN,
}


def prunable_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that are pruned by default: weights of linear, conv, attention and recurrent layers."""
    kind = type(module)
    if issubclass(kind, nn.MultiheadAttention):
        names: tuple[str, ...] = ATTENTION_WEIGHTS
    elif issubclass(kind, nn.RNNBase):
        names = tuple(name for name in module._parameters if name.startswith("weight"))
    elif issubclass(kind, tuple(LINEAR_AND_CONVOLUTION)) or (
        kind.__name__ == "Conv1D" and "transformers" in kind.__module__
    ):
        names = ("weight",)
    else:
        names = ()
    return tuple(name for name in names if module._parameters.get(name) is not None)


def form_of(dense_class: type[nn.Module]) -> str:
    """The form in which a class is extended, unless another module reads its weight ("attribute" then)."""
    if _keeps_our_forward(dense_class):
        return "forward"
    if issubclass(dense_class, nn.RNNBase):
        return "recurrent"  # its forward wraps whichever forward the subclass has
    return "attribute"


def make_sparse(module: nn.Module, thresholds: dict[str, ThresholdBinding], form: str) -> None:
    """Swap a dense layer's class for the sparse one.

    Args:
        module: the layer.
        thresholds: by name of the parameter.
        form: "forward", "recurrent" or "attribute".
    """
    dense_class = type(module)
    module.__class__ = sparse_class(dense_class, form, tuple(thresholds))
    module.__dict__["feather"] = LayerState(dense_class, thresholds, empty_layer)
    module.__dict__["__module__"] = TORCH


def make_dense(module: SparseLayer) -> None:
    """Undo ``make_sparse``; the weights, and classes that wrappers have derived from the sparse one, stay."""
    state = module.__dict__.pop("feather")
    module.__dict__.pop("__module__")
    sparse = sparse_class(state.dense_class, type(module).form, tuple(state.thresholds))
    module.__class__ = _with_base(type(module), sparse, state.dense_class)


def _with_base(cls: type, sparse: type, dense: type[nn.Module]) -> type:
    """``cls``, which is ``sparse`` or a class derived from it (FSDP2's FSDPFeatherLinear), derived from ``dense``."""
    if cls is sparse:
        return dense
    key = (cls, dense)
    if key not in _rebased:
        bases = tuple(_with_base(base, sparse, dense) if issubclass(base, sparse) else base for base in cls.__bases__)
        own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__", "__doc__")}
        _rebased[key] = type(cls.__name__.replace(sparse.__name__, dense.__name__), bases, own)
    return _rebased[key]


_rebased: dict[tuple[type, type], type] = {}


def finalize_weight(module: SparseLayer, name: str) -> None:
    """Write P of the parameter into it, in place."""
    threshold, weight = module.feather.thresholds[name], module.latent(name)
    with torch.no_grad():
        own = local_part(weight)
        torch.ops.feather_kernels.threshold.out(own, threshold.value.to(own.device), threshold.power, out=own)


def empty_layer(dense_class: type[nn.Module], form: str, names: tuple[str, ...]) -> SparseLayer:
    """A sparse layer without state, which a copy or a pickle fills."""
    cls = sparse_class(dense_class, form, names)
    return cls.__new__(cls)


def sparse_class(dense_class: type[nn.Module], form: str, names: tuple[str, ...]) -> type[SparseLayer]:
    """The sparse class of a dense class; for classes outside of the tables it is made once."""
    is_attention = issubclass(dense_class, nn.MultiheadAttention)
    if form == "attribute":
        base: type[SparseLayer] = FeatherMultiheadAttention if is_attention else AttributeLayer
    else:
        table, names = LINEAR_AND_CONVOLUTION if form == "forward" else RECURRENT, ()
        if dense_class in table:
            return table[dense_class]
        bases = (sparse for dense, sparse in table.items() if issubclass(dense_class, dense))
        base = next(bases, recurrent.RecurrentLayer)
    key = (dense_class, form, names)
    if key not in _made:
        casts = is_attention or dense_class.__name__ == "NonDynamicallyQuantizableLinear"  # of its out_proj
        properties = {name: thresholded(name, casts) for name in names}
        _made[key] = type(f"Feather{dense_class.__name__}", (base, dense_class), properties)
    return _made[key]


_made: dict[tuple[type[nn.Module], str, tuple[str, ...]], type[SparseLayer]] = {}


def _keeps_our_forward(dense_class: type[nn.Module]) -> bool:
    """Whether the class is a linear layer or a convolution that keeps all methods that our forward replaces."""
    return any(
        issubclass(dense_class, base)
        and all(getattr(dense_class, name, None) is getattr(base, name, None) for name in ("forward", "_conv_forward"))
        for base in LINEAR_AND_CONVOLUTION
    )
