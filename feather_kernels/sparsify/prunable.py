"""Which parameters of a layer can be pruned, which layers use each of them, and which other modules read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.conversion import LINEAR_AND_CONVOLUTION, prunable_names
from feather_kernels.sparsify import left_dense
from feather_kernels.sparsify.layer_names import ROOT

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import ThresholdBinding

# modules, by their class or a base class, that read the weights of these children without calling them
READERS: dict[str, tuple[str, ...]] = {
    "torch.nn.modules.activation.MultiheadAttention": ("out_proj",),
    "torch.nn.modules.transformer.TransformerEncoderLayer": ("linear1", "linear2"),  # in the fast path of eval mode
    "torchvision.models.swin_transformer.ShiftedWindowAttention": ("qkv", "proj"),
    "torchvision.models.video.swin_transformer.ShiftedWindowAttention3d": ("qkv", "proj"),
    "timm.models.beit.Attention": ("qkv",),
    "timm.models.eva.EvaAttention": ("qkv",),
    "timm.models.swin_transformer_v2.WindowAttention": ("qkv",),
    "transformers.models.mamba.modeling_mamba.MambaMixer": ("conv1d", "dt_proj"),
    "transformers.models.mamba2.modeling_mamba2.Mamba2Mixer": ("conv1d",),
}
# their parameters of two or more dimensions are not weights of connections, so the report omits these layers
NOT_CONNECTIONS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, ParametrizationList)


@dataclass(frozen=True)
class WeightUse:
    """The use of a prunable Parameter by one layer.

    Attributes:
        layer_name: name of the layer, without the components that wrappers such as DDP add.
        path: name of the layer with these components.
        module: the layer.
        parameter_name: name of the Parameter in the layer, usually ``weight``.
        form: how the layer's class is extended, see ``nn.conversion``: "forward", "recurrent" or "attribute".
        note: remark for the report, or "".
    """

    layer_name: str
    path: str
    module: nn.Module
    parameter_name: str
    form: str
    note: str

    @property
    def name(self) -> str:
        """The layer's name, followed by the Parameter's unless that is ``weight``."""
        if self.parameter_name == "weight":
            return self.layer_name or ROOT
        return f"{self.layer_name}.{self.parameter_name}".lstrip(".")

    @property
    def latent(self) -> Tensor:
        """The Parameter that the layer holds now.

        Raises:
            RuntimeError: the layer has no Parameter of that name any more.
        """
        parameter = self.module._parameters.get(self.parameter_name)
        if parameter is None:
            raise RuntimeError(f"{self.name} has lost its Parameter (parametrized or pruned after it was made sparse?)")
        return parameter

    @property
    def binding(self) -> ThresholdBinding:
        """The threshold and the gradient scale; only sparse layers have one."""
        return cast("SparseLayer", self.module).feather.thresholds[self.parameter_name]


@dataclass(frozen=True)
class PrunableWeight:
    """A Parameter that is pruned, with all layers that use it.

    Attributes:
        uses: one entry per layer that holds the Parameter; more than one if the weight is tied.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=10)
        >>> [(weight.name, tuple(weight.parameter.shape)) for weight in sparsifier.weights]
        [('0', (4, 8)), ('2', (2, 4))]
    """

    uses: tuple[WeightUse, ...]

    @property
    def parameter(self) -> Tensor:
        """The Parameter that the layers hold now.

        Raises:
            RuntimeError: a layer has lost it, or the layers no longer hold the same one.
        """
        first, *others = (use.latent for use in self.uses)
        if any(other is not first for other in others):
            raise RuntimeError(f"the weight of {self.name} is no longer tied (to_empty? assign=True?): tie it again")
        return first

    @property
    def name(self) -> str:
        """The names of its uses, joined by ``=``."""
        return " = ".join(use.name for use in self.uses)

    @property
    def note(self) -> str:
        """The notes of its uses, each once."""
        return "; ".join(dict.fromkeys(use.note for use in self.uses if use.note))


def weight_parameters(module: nn.Module) -> dict[str, Parameter]:
    """The Parameters of a module that are or could be weights, by name, including those inside parametrizations."""
    own = {key: value for key, value in module._parameters.items() if value is not None and not is_lazy(value)}
    if is_parametrized(module):
        own.update(cast("nn.Module", module.parametrizations).named_parameters("parametrizations"))
    prunable = prunable_names(module)  # also if a library has flattened them to one dimension
    return {key: value for key, value in own.items() if value.dim() >= 2 or key in prunable}


def prunable_parameters(name: str, module: nn.Module, named_exactly: bool) -> tuple[tuple[str, ...], str | None]:
    """The parameters of a module that can be pruned.

    Args:
        name: name of the module, for messages.
        module: the module.
        named_exactly: whether ``targets`` has its name or class; then layers of any kind are prunable.

    Returns:
        Their names, and if there are none, the reason.

    Raises:
        ValueError: the layer is sparse already, or lazy and not initialised.
    """
    kind = type(module).__name__
    if isinstance(module, SparseLayer):
        raise ValueError(f"model must be dense, but layer {name!r} is sparse already (a second Sparsifier?)")
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if any(map(is_lazy, own.values())):
        raise ValueError(f"layer {name!r} ({kind}) is not initialised: run one forward pass first")
    if is_parametrized(module):
        return (), f"{kind}: one of its parameters has a parametrization"
    parameters = prunable_names(module)
    if not parameters and isinstance(module, tuple(LINEAR_AND_CONVOLUTION)):
        return (), f"{kind}: its weight is not a Parameter (weight_norm, spectral_norm, prune)"
    if not parameters and named_exactly:
        parameters = tuple(key for key, value in own.items() if value.dim() >= 2)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None):
            return (), f"{kind} with sparse gradients or max_norm"
    return parameters, None if parameters else left_dense.other_kind_reason(name, module)


def layers_read_by_parents(model: nn.Module) -> set[nn.Module]:
    """The layers of a model whose weights are read by the modules around them (``READERS``)."""
    read: set[nn.Module] = set()
    for module in model.modules():
        for ancestor in type(module).__mro__:
            children = (
                getattr(module, child, None)
                for child in READERS.get(f"{ancestor.__module__}.{ancestor.__qualname__}", ())
            )
            read.update(child for child in children if isinstance(child, nn.Module))
    return read
