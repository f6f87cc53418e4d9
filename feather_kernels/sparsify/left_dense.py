"""The weights that stay dense unless ``targets`` names them: adapters, frozen and standardised weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from feather_kernels.sparsify.layer_names import steps

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parameter import Parameter

FROZEN = "frozen (requires_grad=False): pruned only if targets names it"

# convolutions that standardise their weight in forward, by the name of their class or of a base class
STANDARDISED = (
    "StdConv2d",  # timm; also the two below
    "StdConv2dSame",
    "ScaledStdConv2d",
    "ScaledStdConv2dSame",
    "WeightStandardizedConv2d",  # transformers' BiT, and others
    "WSConv1d",
    "WSConv2d",
    "ScaledWSConv2d",
    "ConvWS2d",  # mmcv
    "ConvAWS2d",
)


def adapter_of(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The component of a path that belongs to an adapter, or None.

    Such a component begins with ``lora_``, or the module around it lists it in ``adapter_layer_names``, as peft does.

    Args:
        path: the path of a module or Parameter.
        modules: all modules of the model, by path.
    """
    return next(
        (
            child
            for child, parent in steps(path, modules)
            if child.startswith("lora_") or child in getattr(parent, "adapter_layer_names", ())
        ),
        None,
    )


def adapter_reason(adapter: str) -> str:
    """The reason why an adapter's weight stays dense, given the component that ``adapter_of`` returned."""
    kind = "LoRA adapter" if adapter.startswith("lora_") else "adapter"
    return f"{kind} ({adapter}): pruned only if targets has its exact name"


def default_reason(module: nn.Module, weight: Parameter) -> str | None:
    """The reason why a prunable weight stays dense by default, or None."""
    if not weight.requires_grad:
        return FROZEN
    if not _standardises(module):
        return None
    kind = type(module).__name__
    return f"{kind} standardises its weight, so that zeros do not stay zero: pruned only if targets names it"


def note_on(module: nn.Module) -> str:
    """A remark for the report on a layer that is pruned, or ""."""
    return "standardised after P, so that the convolution does not see these zeros" if _standardises(module) else ""


def _standardises(module: nn.Module) -> bool:
    return any(ancestor.__name__ in STANDARDISED for ancestor in type(module).__mro__)


def other_kind_reason(name: str, module: nn.Module) -> str:
    """The reason why a layer of another kind stays dense; for fused experts (3-d), also how to prune them too."""
    reason = f"{type(module).__name__}: pruned only if targets names it"
    own = (parameter for parameter in module._parameters.values() if parameter is not None)
    if name and any(parameter.dim() == 3 and min(parameter.shape) > 1 for parameter in own):
        return f'{reason}; targets=["re:.*", "{name}"] prunes it and the default layers'
    return reason
