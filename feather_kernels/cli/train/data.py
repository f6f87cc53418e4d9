"""Training data: named data sets and ``.npz`` files, checked and kept as uint8 tensors."""

from __future__ import annotations

import ast
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import unknown_name
from feather_kernels.cli.train.batches import AUGMENTED_SHAPE

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEYS = ("x_train", "y_train", "x_test", "y_test")
MAX_CHANNELS = 4
MAX_CLASSES = 100_000  # larger "labels" are something else


@dataclass(frozen=True)
class Dataset:
    """Images uint8 (N, H, W, C) and labels int64 (N,), for training and for testing."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(H, W, C)."""
        return tuple(self.x_train.shape[1:])

    @property
    def classes(self) -> int:
        """The number of classes: the largest training label + 1."""
        return int(self.y_train.max()) + 1

    def absent_classes(self) -> list[int]:
        """The classes without a training image; the network has an output for each that never learns."""
        return torch.nonzero(torch.bincount(self.y_train) == 0).flatten().tolist()

    def facts(self) -> dict[str, Any]:
        """Sizes and a checksum, by which a resumed run recognises its data."""
        checksum = 0
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
        return {
            "train_images": len(self.x_train),
            "test_images": len(self.x_test),
            "image_shape": list(self.image_shape),
            "classes": self.classes,
            "crc32": checksum,
        }


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and the defaults that suit it.

    Attributes:
        load: takes the folder for downloads and returns the four arrays of ``KEYS``.
        module: the package that it needs besides numpy.
        epochs, batch_size: defaults.
    """

    load: Callable[[str], dict[str, Any]]
    module: str
    epochs: int
    batch_size: int = 128


def load(data: str, data_dir: str) -> Dataset:
    """Load and check the data named by ``--data``.

    Args:
        data: a key of ``SOURCES``, or the path of an .npz file with the arrays of ``KEYS``.
        data_dir: folder for downloads.

    Raises:
        InputError: the name is unknown, the file is invalid, or the download failed.
    """
    return _check(f"--data {data}", source_of(data).load(data_dir))


def source_of(data: str) -> Source:
    """The source named by ``--data``; raises InputError unless it is a known name or an existing file."""
    if data in SOURCES:
        return SOURCES[data]
    if not Path(data).is_file():
        problem = "no such file" if data.endswith(".npz") else "neither a known name nor a file"
        raise unknown_name("--data", data, SOURCES, otherwise="an .npz file", problem=problem)
    batch_size = 128 if _header_shape(data)[1:] == AUGMENTED_SHAPE else 64
    return Source(lambda data_dir: _read_npz(data), "numpy", epochs=30, batch_size=batch_size)  # noqa: ARG005


def _load_digits(data_dir: str) -> dict[str, Any]:  # noqa: ARG001  (part of scikit-learn, nothing to download)
    """1,797 images of 8x8 pixels; every fifth of each class is a test image."""
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target  # grey levels 0..16 -> 0..240
    test = np.zeros(len(labels), dtype=bool)
    test[np.argsort(labels, kind="stable")[::5]] = True
    return dict(zip(KEYS, (images[~test], labels[~test], images[test], labels[test]), strict=True))


def _load_torchvision(dataset: str, data_dir: str) -> dict[str, Any]:
    import numpy as np
    from torchvision import datasets

    arrays = {}
    try:
        for part in ("train", "test"):
            loaded = getattr(datasets, dataset)(data_dir, train=part == "train", download=True)
            arrays[f"x_{part}"] = np.asarray(loaded.data)
            arrays[f"y_{part}"] = np.asarray(loaded.targets)
    except (OSError, RuntimeError) as error:  # what torchvision raises for network, disk and checksum
        raise InputError(f"--data: {dataset} could not be loaded into --data-dir {data_dir!r}: {error}") from error
    return arrays


SOURCES: dict[str, Source] = {
    "digits": Source(_load_digits, "sklearn", epochs=30, batch_size=64),
    "fashion-mnist": Source(partial(_load_torchvision, "FashionMNIST"), "torchvision", epochs=30),
    "cifar10": Source(partial(_load_torchvision, "CIFAR10"), "torchvision", epochs=160),
    "cifar100": Source(partial(_load_torchvision, "CIFAR100"), "torchvision", epochs=160),
}
DEFAULT_DATA = "digits"

# raised by numpy and zipfile for damaged, encrypted, foreign and impossibly large members
_UNREADABLE = (ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def _header_shape(path: str) -> tuple[int, ...]:
    """The shape of x_train, from its header alone and without numpy; () if ``_read_npz`` will refuse the file.

    An array starts with (numpy.lib.format) 6 bytes of magic, 2 of version, 2 or 4 with the length of the header, and
    the header as a Python literal.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{KEYS[0]}.npy") as member:
            width = 2 if member.read(8)[6:7] == b"\x01" else 4
            header = ast.literal_eval(member.read(int.from_bytes(member.read(width), "little")).decode("latin1"))
        return tuple(header["shape"])
    except (*_UNREADABLE, KeyError, TypeError, SyntaxError):
        return ()


def _read_npz(path: str) -> dict[str, Any]:
    import numpy as np

    if not zipfile.is_zipfile(path):
        raise InputError(f"--data must be an .npz file, got {path!r}: not a zip archive")
    try:
        with np.load(path, allow_pickle=False) as archive:
            found = list(archive.files)
            arrays = {key: np.asarray(archive[key]) for key in KEYS if key in found}
    except _UNREADABLE as error:
        raise InputError(f"--data must be an .npz file that numpy can read, got {path!r}: {error}") from error
    missing = [key for key in KEYS if key not in arrays]
    if missing:
        got = ", ".join(found) or "nothing"
        raise InputError(f"--data {path}: must hold {', '.join(KEYS)}; missing {', '.join(missing)}, got {got}")
    return arrays


def _check(argument: str, arrays: dict[str, Any]) -> Dataset:
    """Check shapes, dtypes and labels, and make a data set; errors start with ``argument``."""
    tensors = {}
    for part in ("train", "test"):
        x, y = f"x_{part}", f"y_{part}"
        tensors[x] = _check_images(f"{argument}: {x}", arrays[x])
        tensors[y] = _check_labels(f"{argument}: {y}", arrays[y])
        if len(tensors[x]) != len(tensors[y]):
            raise InputError(
                f"{argument}: {x} and {y} must have the same length, got {len(tensors[x])} and {len(tensors[y])}"
            )
    dataset = Dataset(**tensors)
    if dataset.x_test.shape[1:] != dataset.x_train.shape[1:]:
        raise InputError(
            f"{argument}: x_test must have the image shape of x_train {dataset.image_shape}, "
            f"got {tuple(dataset.x_test.shape[1:])}"
        )
    if int(dataset.y_test.max()) >= dataset.classes:
        raise InputError(
            f"{argument}: y_test must have labels in [0, {dataset.classes}) as y_train has, "
            f"got {int(dataset.y_test.max())}"
        )
    return dataset


def _check_images(argument: str, array: NDArray[Any]) -> Tensor:
    if array.dtype != "uint8":
        raise InputError(f"{argument} must be uint8, got {array.dtype} (scale to 0 to 255 and convert to uint8)")
    if array.ndim not in (3, 4) or 0 in array.shape or (array.ndim == 4 and array.shape[3] > MAX_CHANNELS):
        channels_first = array.ndim == 4 and 1 <= array.shape[1] <= MAX_CHANNELS < array.shape[3]
        raise InputError(
            f"{argument} must have shape (N, H, W) or (N, H, W, C) with at least one image and at most "
            f"{MAX_CHANNELS} channels, got {array.shape}{' (move the channels last)' if channels_first else ''}"
        )
    return torch.tensor(array, dtype=torch.uint8, device="cpu").reshape(*array.shape[:3], -1)


def _check_labels(argument: str, array: NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "iu":
        raise InputError(f"{argument} must be integers, got {array.dtype}")
    if array.ndim not in (1, 2) or 0 in array.shape or (array.ndim == 2 and array.shape[1] != 1):
        raise InputError(f"{argument} must have shape (N,) or (N, 1) with at least one label, got {array.shape}")
    for label in (array.min(), array.max()):
        if not 0 <= label < MAX_CLASSES:
            raise InputError(f"{argument} must have labels in [0, {MAX_CLASSES}), got {label}")
    return torch.tensor(array.astype("int64"), dtype=torch.int64, device="cpu").reshape(-1)
