"""Which weights of a model are made sparse, in which form, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn.parameter import Parameter, is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from feather_kernels.checks import check_number
from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.conversion import CALLED, form_of, prunable_names
from feather_kernels.sparsify import left_dense
from feather_kernels.sparsify.names import ROOT, Target, canonical, check_targets, matches

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import ThresholdBinding

FilterFn = Callable[[nn.Module, str], bool]

# modules that read the weights of these children themselves, by a class in their ancestry
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
# parameters of two or more dimensions that are no connections; their layers are not worth a line in the report
_NOT_PRUNABLE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, ParametrizationList)


@dataclass(frozen=True)
class Use:
    """A parameter in one layer.

    ``path`` is the layer's name with what wrappers add to it. ``form`` says how the layer's class is extended
    (``nn.conversion``). ``note`` is what the report says of the layer.
    """

    layer_name: str
    path: str
    module: nn.Module
    parameter_name: str
    form: str
    note: str

    @property
    def name(self) -> str:
        """The layer's name; with the parameter's where that is not ``weight``."""
        if self.parameter_name == "weight":
            return self.layer_name or ROOT
        return f"{self.layer_name}.{self.parameter_name}".lstrip(".")

    @property
    def latent(self) -> Tensor:
        """The Parameter, as the layer holds it now; raises RuntimeError if something took it away."""
        parameter = self.module._parameters.get(self.parameter_name)
        if parameter is None:
            raise RuntimeError(f"{self.name} has lost its Parameter (parametrized or pruned after it was made sparse?)")
        return parameter

    @property
    def binding(self) -> ThresholdBinding:
        """Its threshold and gradient scale, once the layer is sparse."""
        return cast("SparseLayer", self.module).feather.thresholds[self.parameter_name]


@dataclass(frozen=True)
class PrunableWeight:
    """One distinct Parameter and its uses (several if it is tied)."""

    uses: tuple[Use, ...]

    @property
    def parameter(self) -> Tensor:
        """The Parameter, as the layers hold it now; raises RuntimeError if they hold different ones."""
        first, *others = (use.latent for use in self.uses)
        if any(other is not first for other in others):
            raise RuntimeError(f"the weight of {self.name} is no longer tied (to_empty? assign=True?): tie it again")
        return first

    @property
    def name(self) -> str:
        """Names of the uses, joined by ``=`` where the weight is tied."""
        return " = ".join(use.name for use in self.uses)

    @property
    def note(self) -> str:
        """Notes of the uses."""
        return "; ".join(dict.fromkeys(use.note for use in self.uses if use.note))


@dataclass(frozen=True)
class SkippedLayer:
    """A layer that holds a weight and stays dense.

    ``numel`` counts the elements of its Parameters of two or more dimensions, ``shared`` those among them that a layer
    listed before it holds too.
    """

    name: str
    reason: str
    numel: int
    shared: int


@dataclass(frozen=True)
class Choice:
    """What a user says about the layers to take.

    ``targets`` (default all linear, convolution, attention and recurrent layers) and ``ignore``, which wins, hold names
    of layers or of modules that contain them, ``re:`` patterns for the whole name, or module classes. Names count with
    and without what wrappers add to them (``names.canonical``). Some weights are taken only where ``targets`` asks for
    the layer: adapters by its exact name; by its exact name or its class those that are frozen, those of convolutions
    that standardise their weight, and those of layers of another kind, e.g. an embedding. Layers for which
    ``filter_fn(module, name)`` is false, or whose weights have fewer than ``min_numel`` elements, are left.
    ``read_directly`` names layers whose weight another module reads without calling them.
    """

    targets: Sequence[Target] | None = None
    ignore: Sequence[Target] | None = None
    filter_fn: FilterFn | None = None
    min_numel: int = 0
    read_directly: Sequence[Target] | None = None

    def names_exactly(self, names: Collection[str], module: nn.Module | None = None) -> bool:
        """Whether ``targets`` has one of these names or, where ``module`` is given, its class."""
        return any(
            target in names if isinstance(target, str) else module is not None and isinstance(module, target)
            for target in self.targets or ()
        )

    def why_left(self, names: Sequence[str], module: nn.Module, weights: Iterable[Tensor]) -> str | None:
        """Reason of the user's to leave a layer, or None; its canonical name comes first among ``names``."""
        if self.targets is not None and not matches(names, module, self.targets):
            return "not in targets"
        if self.ignore is not None and matches(names, module, self.ignore):
            return "in ignore"
        if self.filter_fn is not None and not self.filter_fn(module, names[0]):
            return "rejected by filter_fn"
        numel = max((weight.numel() for weight in weights), default=0)
        return f"{numel} elements, fewer than min_numel = {self.min_numel}" if numel < self.min_numel else None

    def check(self, names: Mapping[nn.Module, Collection[str]]) -> None:
        """Raise TypeError or ValueError unless every entry has the right type and matches a module."""
        for argument in ("targets", "ignore", "read_directly"):
            check_targets(argument, getattr(self, argument), names)
        if self.filter_fn is not None and not callable(self.filter_fn):
            raise TypeError(f"filter_fn must be a function of a module and its name, got {self.filter_fn!r}")
        check_number("min_numel", self.min_numel)
        if self.min_numel < 0:
            raise ValueError(f"min_numel must be at least 0, got {self.min_numel}")


def select_weights(model: nn.Module, choice: Choice) -> tuple[list[PrunableWeight], list[SkippedLayer], list[Use]]:
    """Prunable weights of a model in the order of its modules, the skipped layers, and which weights are left frozen.

    Raises:
        TypeError: an option of the choice has the wrong type.
        ValueError: an entry of targets, ignore or read_directly that matches no module; a lazy layer that is not yet
            initialised; a layer that is sparse already.
    """
    modules = dict(model.named_modules())
    layers = {module: _Layer(canonical(path, modules), path, module) for path, module in modules.items()}
    choice.check({module: layer.names for module, layer in layers.items()})
    read = _read_by_parents(model)
    taken: dict[tuple[nn.Module, str], Use] = {}
    left: list[_Left] = []
    frozen: list[Use] = []
    for module, layer in layers.items():
        weights = _weights(module)
        reasons = _reasons(layer, weights, modules, choice)
        uses = {key: _use(layer, key, module in read, choice) for key in reasons}
        taken.update({(module, key): uses[key] for key, reason in reasons.items() if reason is None})
        frozen += [uses[key] for key, reason in reasons.items() if reason == left_dense.FROZEN]
        distinct = set(reasons.values())
        if len(distinct) == 1 and None not in distinct:
            left.append((layer.name or ROOT, distinct.pop() or "", [weights[key] for key in reasons]))
        else:
            left += [(uses[key].name, reason, [weights[key]]) for key, reason in reasons.items() if reason]
    prunable, tied = _group_by_parameter(layers, taken)
    return prunable, _skipped_layers(left + tied), frozen


@dataclass(frozen=True)
class _Layer:
    """A module with its canonical name and its path."""

    name: str
    path: str
    module: nn.Module

    @property
    def names(self) -> tuple[str, str]:
        return self.name, self.path


_Left = tuple[str, str, list[Parameter]]  # name, reason, weights


def _reasons(
    layer: _Layer, weights: Mapping[str, Parameter], modules: Mapping[str, nn.Module], choice: Choice
) -> dict[str, str | None]:
    """By the name of each weight of a layer why it is left, None where it is taken; {} if nothing is to be said."""
    module = layer.module
    candidates, reason = _candidates(layer, choice)
    by_name, asked = choice.names_exactly(layer.names), choice.names_exactly(layer.names, module)
    if by_name and not weights and not module._modules:
        kind = type(module).__name__
        raise ValueError(f"targets names {layer.name!r}, but {kind} has no weight of two or more dimensions")
    if not candidates and isinstance(module, _NOT_PRUNABLE) and not is_parametrized(module) and not asked:
        return {}
    reason = reason or choice.why_left(layer.names, module, (weights[key] for key in candidates))
    reasons: dict[str, str | None] = {}
    for key, weight in weights.items():
        adapter = None if by_name else left_dense.adapter_of(f"{layer.path}.{key}".lstrip("."), modules)
        if adapter:
            reasons[key] = left_dense.adapter_reason(adapter)
        elif reason:
            reasons[key] = reason
        elif key in candidates:
            reasons[key] = None if asked else left_dense.default_reason(module, weight)
    return reasons


def _candidates(layer: _Layer, choice: Choice) -> tuple[tuple[str, ...], str | None]:
    """Names of the parameters that could be pruned, and the reason why none can, if there is one."""
    name, module = layer.name, layer.module
    kind = type(module).__name__
    if isinstance(module, SparseLayer):
        raise ValueError(f"model must be dense, but layer {name!r} is sparse already (a second Sparsifier?)")
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if any(map(is_lazy, own.values())):
        raise ValueError(f"layer {name!r} ({kind}) is not initialised: run one forward pass first")
    if is_parametrized(module):
        return (), f"{kind}: one of its parameters has a parametrization"
    parameters = prunable_names(module)
    if not parameters and isinstance(module, tuple(CALLED)):
        return (), f"{kind}: its weight is not a Parameter (weight_norm, spectral_norm, prune)"
    if not parameters and choice.names_exactly(layer.names, module):
        parameters = tuple(key for key, value in own.items() if value.dim() >= 2)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and (module.sparse or module.max_norm is not None):
            return (), f"{kind} with sparse gradients or max_norm"
    return parameters, None if parameters else left_dense.untaken_reason(name, module)


def _weights(module: nn.Module) -> dict[str, Parameter]:
    """By name the Parameters of a module that are, or could be, weights, and those that its parametrizations hold."""
    own = {key: value for key, value in module._parameters.items() if value is not None and not is_lazy(value)}
    if is_parametrized(module):
        own.update(cast("nn.Module", module.parametrizations).named_parameters("parametrizations"))
    prunable = prunable_names(module)  # also where a library has flattened them
    return {key: value for key, value in own.items() if value.dim() >= 2 or key in prunable}


def _use(layer: _Layer, key: str, read: bool, choice: Choice) -> Use:
    module, form = layer.module, form_of(type(layer.module))
    wrapped = "forward" in module.__dict__  # by a library that keeps, and calls, the dense forward
    if form == "call" and (wrapped or read or matches(layer.names, module, choice.read_directly or ())):
        form = "read"
    return Use(layer.name, layer.path, module, key, form, left_dense.note_on(module))


def _read_by_parents(model: nn.Module) -> set[nn.Module]:
    """Layers whose weight the module that holds them reads itself."""
    read: set[nn.Module] = set()
    for module in model.modules():
        for ancestor in type(module).__mro__:
            children = (
                getattr(module, child, None)
                for child in READERS.get(f"{ancestor.__module__}.{ancestor.__qualname__}", ())
            )
            read.update(child for child in children if isinstance(child, nn.Module))
    return read


def _group_by_parameter(
    layers: Mapping[nn.Module, _Layer], taken: Mapping[tuple[nn.Module, str], Use]
) -> tuple[list[PrunableWeight], list[_Left]]:
    """One entry per distinct Parameter; one that another module reads densely is left to all of its layers."""
    holders: dict[Parameter, list[tuple[nn.Module, str]]] = {}
    for module in layers:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((module, key))
    weights: list[PrunableWeight] = []
    left: list[_Left] = []
    for parameter, holding in holders.items():
        dense = [module for module, key in holding if (module, key) not in taken]
        uses = tuple(taken[holder] for holder in holding if holder in taken)
        if uses and dense:
            name, kind = layers[dense[0]].name, type(dense[0]).__name__
            left += [
                (use.name, f"its weight is tied to {name!r} ({kind}), which stays dense", [parameter]) for use in uses
            ]
        elif uses:
            weights.append(PrunableWeight(uses))
    return weights, left


def _skipped_layers(left: Iterable[_Left]) -> list[SkippedLayer]:
    """What was left with its sizes; the elements of a Parameter are counted where it comes first."""
    seen: set[Parameter] = set()
    skipped = []
    for name, reason, parameters in left:
        shared = sum(parameter.numel() for parameter in parameters if parameter in seen)
        skipped.append(SkippedLayer(name, reason, sum(parameter.numel() for parameter in parameters), shared))
        seen.update(parameters)
    return skipped
