"""Options of a training run: defaults, checks, and the form in which config.json keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from feather_kernels.functional import check_sparsity
from feather_kernels.ops import dispatch
from feather_kernels.recipes import data as data_sources
from feather_kernels.recipes.errors import InputError
from feather_kernels.recipes.models import DEFAULT_MODEL, MODELS

MAX_THREADS = 4096
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every option of a run, resolved.

    Attributes:
        data: a name of ``data.SOURCES``, or the absolute path of an .npz file.
        data_dir: folder for downloads.
        model: a name of ``models.MODELS``.
        sparsity: final fraction of zeros among the prunable weights, in [0, 1).
        epochs, batch_size, threads: at least 1; batch_size in images.
        lr: peak learning rate, positive.
        weight_decay: at least 0.
        seed: at least 0.
        dtype: a name of ``DTYPES``; bfloat16 is autocast.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        runs: folder of all runs.
        name: folder of this run in it; None until one is chosen.

    Raises:
        InputError: an option is outside of that, or this machine lacks the device or the backend asked for.
    """

    data: str
    data_dir: str
    model: str = DEFAULT_MODEL
    sparsity: float = 0.95
    epochs: int
    batch_size: int
    lr: float = 0.1
    weight_decay: float = 5e-4
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
        _check("--model", self.model in MODELS, f"one of {', '.join(MODELS)}", self.model)
        _check("--dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}", self.dtype)
        _check("--epochs", self.epochs >= 1, "at least 1", self.epochs)
        _check("--batch-size", self.batch_size >= 1, "at least 1", self.batch_size)
        _check("--threads", 1 <= self.threads <= MAX_THREADS, f"in [1, {MAX_THREADS}]", self.threads)
        _check("--seed", 0 <= self.seed < 2**63, "in [0, 2^63)", self.seed)
        _check("--lr", 0 < self.lr < math.inf, "positive and finite", self.lr)
        _check("--weight-decay", 0 <= self.weight_decay < math.inf, "finite and at least 0", self.weight_decay)
        if self.name is not None:
            plain = self.name not in ("", ".", "..") and not set(self.name) & {"/", "\0"}
            _check("--name", plain, "the name of one folder", self.name)
        data_sources.source_of(self.data)
        _check_device(self.device)

    @property
    def data_name(self) -> str:
        """Short name of the data, e.g. ``cifar100`` for /data/cifar100.npz."""
        return self.data if self.data in data_sources.SOURCES else Path(self.data).stem

    @property
    def default_name(self) -> str:
        """DATA-MODEL-SPARSITY, e.g. ``digits-cnn-0.95``."""
        return f"{self.data_name}-{self.model}-{self.sparsity:g}"


def resolve(given: dict[str, Any]) -> TrainConfig:
    """The given options, with defaults for the others; epochs and batch size depend on the data.

    Raises:
        InputError: see ``TrainConfig``.
    """
    data = given.get("data", data_sources.DEFAULT_DATA)
    source = data_sources.source_of(data)
    options = {"epochs": source.epochs, "batch_size": source.batch_size, **given}
    options["data"] = data if data in data_sources.SOURCES else str(Path(data).resolve())
    options["data_dir"] = str(Path(given.get("data_dir", "data")).resolve())
    return TrainConfig(**options)


def from_json(options: object) -> TrainConfig:
    """The inverse of ``dataclasses.asdict``.

    Raises:
        InputError: a name is missing, unknown or has a value of the wrong type; see also ``TrainConfig``.
    """
    names = [field.name for field in fields(TrainConfig)]
    if not isinstance(options, dict) or set(options) != set(names):
        got = sorted(options) if isinstance(options, dict) else options
        raise InputError(f"options must be {', '.join(names)}; got {got}")
    for name, kind in get_type_hints(TrainConfig).items():
        if not isinstance(options[name], int | float if kind is float else kind):
            raise InputError(f"option {name} must be {getattr(kind, '__name__', kind)}, got {options[name]!r}")
    return TrainConfig(**options)


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
        dispatch.backend_for(device)
    except ValueError as error:  # FEATHER_KERNELS_BACKEND holds an unknown name
        raise InputError(str(error)) from error
