"""The options of a training run: their defaults, their checks, and how config.json stores them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from feather_kernels.backends.registry import registry
from feather_kernels.checks import check_grad_scale, check_power, check_sparsity
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import unknown_name
from feather_kernels.cli.train import data as data_sources
from feather_kernels.cli.train.methods import DEFAULT_METHOD, METHODS, Method
from feather_kernels.cli.train.models import DEFAULT_MODEL, check_model

DEFAULT_SPARSITY = 0.95
MAX_THREADS = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All options of a run, with defaults filled in.

    Attributes:
        data: a name of ``data.SOURCES``, or the absolute path of an .npz file.
        data_dir: folder for downloads.
        model: a name of ``models.MODELS``, or ``torchvision:NAME``.
        method: a name of ``methods.METHODS``.
        power, grad_scale: arguments of ``Sparsifier``; None for those of the method. Only Feather takes another power.
        sparsity: the final fraction of zeros among the prunable weights, in [0, 1); 0 if the method prunes nothing.
        epochs: at least 1.
        batch_size: images per step, at least 1.
        threads: CPU threads, in [1, ``MAX_THREADS``].
        lr: the peak learning rate, positive.
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0.
        clip: the largest norm of the whole gradient, positive; inf turns clipping off.
        seed: in [0, 2^63).
        dtype: a name of ``DTYPES``; bfloat16 means autocast.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        runs: the folder that holds all runs.
        name: the folder of this run in it; None until one is chosen.

    Raises:
        InputError: an option violates this, or this machine lacks the device or the backend asked for.
    """

    data: str
    data_dir: str
    model: str = DEFAULT_MODEL
    method: str = DEFAULT_METHOD
    power: float | None = None
    grad_scale: float | str | None = None
    sparsity: float = DEFAULT_SPARSITY
    epochs: int
    batch_size: int
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    clip: float = 3.0
    seed: int = 0
    dtype: str = "float32"
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    threads: int = field(default_factory=torch.get_num_threads)
    runs: str = "runs"
    name: str | None = None

    def __post_init__(self) -> None:
        try:
            check_sparsity("--sparsity", self.sparsity)
        except ValueError as error:
            raise InputError(str(error)) from error
        check_model(self.model)
        self._check_method()
        if self.dtype not in DTYPES:
            raise unknown_name("--dtype", self.dtype, DTYPES)
        _check("--epochs", self.epochs >= 1, "at least 1", self.epochs)
        _check("--batch-size", self.batch_size >= 1, "at least 1", self.batch_size)
        _check("--threads", 1 <= self.threads <= MAX_THREADS, f"in [1, {MAX_THREADS}]", self.threads)
        _check("--seed", 0 <= self.seed < 2**63, "in [0, 2^63)", self.seed)
        _check("--lr", 0 < self.lr < math.inf, "positive and finite", self.lr)
        _check("--momentum", 0 <= self.momentum < 1, "in [0, 1)", self.momentum)
        _check("--weight-decay", 0 <= self.weight_decay < math.inf, "finite and at least 0", self.weight_decay)
        _check("--clip", self.clip > 0, "positive", self.clip)
        if self.name is not None:
            plain = self.name not in ("", ".", "..") and not set(self.name) & {"/", "\0"}
            _check("--name", plain, "the name of one folder", self.name)
        data_sources.source_of(self.data)
        _check_device(self.device)

    def _check_method(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("--method", self.method, METHODS)
        if not METHODS[self.method].prunes:
            given = {"--sparsity": self.sparsity or None, "--power": self.power, "--grad-scale": self.grad_scale}
            for argument, value in given.items():
                _check(argument, value is None, f"omitted with --method {self.method}, which prunes nothing", value)
        elif self.method != DEFAULT_METHOD:  # a method is its power, or a run would bear the name of another
            own = METHODS[self.method].power
            expected = f"omitted with --method {self.method}, whose power is {own:g} (--method feather takes any)"
            _check("--power", self.power in (None, own), expected, self.power)
        try:
            check_power(self.settings.power)
            if self.settings.grad_scale != "auto":
                check_grad_scale(self.settings.grad_scale)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise InputError(
                f"--{str(error).replace('_', '-', 1)}"
            ) from error  # the message starts with the name of the option

    @property
    def settings(self) -> Method:
        """The method with this run's power and gradient scale."""
        method = METHODS[self.method]
        power = method.power if self.power is None else self.power
        grad_scale = method.grad_scale if self.grad_scale is None else self.grad_scale
        return replace(method, power=power, grad_scale=grad_scale)

    @property
    def data_name(self) -> str:
        """The short name of the data, e.g. ``cifar100`` for /data/cifar100.npz."""
        return self.data if self.data in data_sources.SOURCES else Path(self.data).stem

    @property
    def default_name(self) -> str:
        """DATA-MODEL-SPARSITY, e.g. ``digits-cnn-0.95``; other methods than Feather come before SPARSITY."""
        method = "" if self.method == DEFAULT_METHOD else f"{self.method}-"
        return f"{self.data_name}-{self.model.replace(':', '-')}-{method}{self.sparsity:g}"


def resolve(given: dict[str, Any]) -> TrainConfig:
    """Fill in the defaults of all options that are not given; some depend on the data and the method.

    Args:
        given: values by the names of ``TrainConfig``; paths may be relative.

    Raises:
        InputError: see ``TrainConfig``.
    """
    data = given.get("data", data_sources.DEFAULT_DATA)
    source = data_sources.source_of(data)
    options = {"epochs": source.epochs, "batch_size": source.batch_size, **given}
    method = METHODS.get(given.get("method", DEFAULT_METHOD))
    if method is not None and not method.prunes:
        options = {"sparsity": 0.0, **options}
    options["data"] = data if data in data_sources.SOURCES else str(Path(data).resolve())
    options["data_dir"] = str(Path(given.get("data_dir", "data")).resolve())
    return TrainConfig(**options)


def from_json(options: object) -> TrainConfig:
    """Make a configuration from the options in config.json, where ``dataclasses.asdict`` has put them.

    Raises:
        InputError: an option is missing, unknown or of the wrong type; see also ``TrainConfig``.
    """
    names = [field.name for field in fields(TrainConfig)]
    if not isinstance(options, dict) or set(options) != set(names):
        got = sorted(options) if isinstance(options, dict) else options
        raise InputError(f"options must be {', '.join(names)}; got {got}")
    for name in names:
        check_type(f"option {name}", name, options[name])
    return TrainConfig(**options)


def check_type(label: str, name: str, value: object) -> None:
    """Raise InputError unless ``value`` has the type of the option ``name``; the message starts with ``label``."""
    kind = get_type_hints(TrainConfig)[name]
    kinds = get_args(kind) or (kind,)
    wanted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InputError(f"{label} must be {names}, got {value!r}")


def _check(argument: str, holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise InputError(f"{argument} must be {expected}, got {value!r}")


def _check_device(name: str) -> None:
    """Raise InputError unless the device exists and a backend runs on it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    _check("--device", device.type in ("cpu", "cuda"), "cpu, cuda or cuda:N", name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        _check("--device", (device.index or 0) < count, f"one of this machine's {count} CUDA devices, or cpu", name)
    try:
        registry.backend_for(device)
    except ValueError as error:  # FEATHER_KERNELS_BACKEND names no backend
        raise InputError(str(error)) from error
