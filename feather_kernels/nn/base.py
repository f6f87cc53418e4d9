"""The base class of all sparse layers, and the state that it adds to a module.

A layer becomes sparse when its class is swapped. The module object, its Parameters, state_dict keys, hooks and
``isinstance`` relations stay as they were. The weight stays dense, as the latent weight that the optimizer updates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from feather_kernels import autograd

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import ThresholdBinding


class WeightVersion(NamedTuple):
    """Identifies the values that a weight holds, as far as torch can tell.

    Attributes:
        weight: the weight itself; a weak reference would make ``torch.utils.swap_tensors`` refuse it.
        address: of its first element.
        version: torch's count of in-place writes; None for inference tensors, which have none.
    """

    weight: Tensor
    address: int
    version: int | None

    @classmethod
    def of(cls, weight: Tensor) -> WeightVersion:
        """The version of the weight at this moment."""
        return cls(weight, weight.data_ptr(), None if weight.is_inference() else weight._version)

    def still_describes(self, weight: Tensor) -> bool:
        """Whether ``weight`` is the same object with the same values; False if torch cannot tell."""
        return (
            self.version is not None
            and self.weight is weight
            and self.address == weight.data_ptr()
            and self.version == weight._version
        )

    def still_holds(self) -> bool:
        """Whether the weight still has the same values."""
        return self.still_describes(self.weight)

    def describes_memory_of(self, alias: Tensor) -> bool:
        """Whether ``alias`` is a view of the weight and the weight still has the same values."""
        return self.still_holds() and self.address == alias.data_ptr()


class LayerState:
    """The state that makes a layer sparse, in addition to the module's own attributes.

    Attributes:
        dense_class: the class that the layer had before, and gets back.
        thresholds: the threshold of each thresholded parameter, by its name.
        rebuild: ``rebuild(dense_class, form, names)`` makes an empty sparse layer, which a copy or a pickle fills.
        copied: the versions of a copy's weights when it was made, by name; empty unless the layer is a copy.
        replaced: names of the parameters that were assigned since the layer was made or copied.
        lock: held by forwards that change the module while they run.
        reads: P of the parameters that the running forward of this thread has read, by name, grad mode and dtype;
            None while no forward runs.
    """

    def __init__(
        self,
        dense_class: type[nn.Module],
        thresholds: dict[str, ThresholdBinding],
        rebuild: Callable[[type[nn.Module], str, tuple[str, ...]], SparseLayer],
        replaced: set[str] | None = None,
    ) -> None:
        self.dense_class = dense_class
        self.thresholds = thresholds
        self.rebuild = rebuild
        self.copied: dict[str, WeightVersion] = {}
        self.replaced = replaced or set()
        self.lock = threading.RLock()
        self._running = threading.local()

    @property
    def reads(self) -> dict[tuple[Any, ...], Tensor] | None:  # noqa: D102  (an attribute of the class docstring)
        return getattr(self._running, "reads", None)

    @reads.setter
    def reads(self, reads: dict[tuple[Any, ...], Tensor] | None) -> None:
        self._running.reads = reads

    def __getstate__(self) -> dict[str, Any]:
        followed = any(binding.thresholds.followed for binding in self.thresholds.values())
        replaced = set() if followed else self.replaced  # the hook will select thresholds for the new values
        return {
            "dense_class": self.dense_class,
            "thresholds": self.thresholds,
            "rebuild": self.rebuild,
            "replaced": replaced,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


Layer = TypeVar("Layer", bound="SparseLayer")
Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def dense_without_state(
    forward: Callable[Concatenate[Layer, Parameters], Result],
) -> Callable[Concatenate[Layer, Parameters], Result]:
    """Make ``forward`` of a sparse class run the dense forward once the layer is dense again.

    Libraries keep bound methods, which outlive ``finalize()``.
    """

    @wraps(forward)
    def run(self: Layer, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        chosen: Callable[Concatenate[Layer, Parameters], Result]
        chosen = forward if "feather" in self.__dict__ else type(self).forward
        return chosen(self, *args, **kwargs)

    return run


class SparseLayer(nn.Module):
    """Base class of all sparse layers: a dense layer that computes with P(weight) instead of its weight.

    ``P(w) = sign(w) (abs(w)^p - T^p)^(1/p)`` where ``abs(w) > T``, else 0: Feather's thresholding operator. The
    Parameter holds the latent weight w, which stays dense and which the optimizer updates. Sparse layers are not
    constructed: ``Sparsifier`` swaps the class of a dense layer, and ``Sparsifier.finalize()`` swaps it back.

    Attributes:
        feather: thresholds and other state of the layer; a plain attribute, no parameter, buffer or submodule.
        can_recompute: whether backward can recompute P(weight), so that forward need not keep it.
        form: how the dense class is extended: "forward", "recurrent" or "attribute"; see ``nn.conversion``.

    Raises:
        TypeError: on construction.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9))
        >>> layer = model[0]
        >>> isinstance(layer, fk.nn.SparseLayer), isinstance(layer, nn.Linear)
        (True, True)
        >>> pruned = layer.sparse_weight() == 0
        >>> pruned.equal(layer.latent().abs() <= sparsifier.threshold)
        True
    """

    feather: LayerState
    can_recompute = False
    form = ""

    def __init_subclass__(cls, **_: Any) -> None:
        """Do nothing: the dense class's hook is meant for subclasses that a user writes, and may require arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise TypeError(f"{type(self).__name__} cannot be constructed: Sparsifier makes it from the dense layer")

    def sparse_weight(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """P of a parameter, differentiable with respect to it.

        Args:
            name: name of the parameter.
            dtype: dtype of the result; None means the parameter's.

        Raises:
            RuntimeError: as ``operands``.
        """
        return autograd.threshold(*self.operands(name, dtype))

    def operands(self, name: str, dtype: torch.dtype | None) -> autograd.SparseWeight:
        """The operands from which P of a parameter is computed.

        Args:
            name: name of the parameter.
            dtype: dtype of the result; None means the parameter's.

        Raises:
            RuntimeError: the layer has lost the Parameter, or it is a copy outside of a sparse model and its Parameter
                was replaced.
        """
        binding = self.feather.thresholds[name]
        if not binding.thresholds.followed:
            if name in self.feather.replaced:
                raise RuntimeError(
                    f"the {name} of this copy of a sparse {self.feather.dense_class.__name__} was replaced (fused? "
                    "reparameterised?), so that the copied threshold does not fit it: finalize a copy of the model "
                    "first, then fuse that"
                )
            binding.thresholds.warn()
        return autograd.SparseWeight(self.latent(name), binding.value, binding.grad_scale, binding.power, dtype)

    def latent(self, name: str = "weight") -> Tensor:
        """The latent weight: the Parameter itself, even if the attribute of that name returns P of it.

        Args:
            name: name of the parameter.

        Raises:
            RuntimeError: the layer has lost the Parameter to something that computes the weight.
        """
        try:
            return cast("Tensor", self._parameters[name])
        except KeyError:
            raise RuntimeError(
                f"a sparse {self.feather.dense_class.__name__} has lost its Parameter {name!r} to a parametrization, "
                "weight norm or torch's pruning: remove that, or finalize() or detach() the model before you apply it"
            ) from None

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter as the dense layer does; assignments to an attribute come here too.

        Args:
            name: name of the parameter.
            param: the new Parameter.
        """
        super().register_parameter(name, param)
        if name in self.feather.thresholds:
            self.feather.replaced.add(name)

    def extra_repr(self) -> str:
        """The dense layer's text, the power p, and whether backward recomputes P(weight)."""
        own = super().extra_repr()
        if "feather" not in self.__dict__:
            return own
        name, threshold = next(iter(self.feather.thresholds.items()))
        weight = self._parameters.get(name)
        recompute = self.can_recompute and weight is not None and threshold.recomputes(weight, None)
        return ", ".join(filter(None, [own, f"power={threshold.power:g}, recompute={recompute}"]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()  # torch.load may have put the weight on another device
        self.feather.copied = {name: WeightVersion.of(self.latent(name)) for name in self.feather.thresholds}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        replaced = set(self.feather.replaced)
        super()._load_from_state_dict(*args, **kwargs)
        self.feather.replaced = replaced
        self._follow()  # assign=True puts other tensors in the weight's place

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError("sparse layers do not run under DataParallel: use DistributedDataParallel")

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this."""
        raise RuntimeError(
            f"torch.jit.script cannot compile a live sparse {self.feather.dense_class.__name__}: finalize a copy of "
            "the model first, and script that"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the dense class: the sparse classes of users' subclasses exist only at run time."""
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return self.feather.rebuild, (self.feather.dense_class, type(self).form, tuple(self.feather.thresholds)), state

    def _follow(self) -> None:
        for name, threshold in self.feather.thresholds.items():
            threshold.follow(self.latent(name))
