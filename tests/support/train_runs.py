"""Training runs for the tests of ``feather-kernels train``: the command in this process, and npz data.

Importing this module skips the test module if a package of the extra ``train`` is missing.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from feather_kernels import cli

np = pytest.importorskip("numpy")
for module in ("matplotlib", "rich", "safetensors", "sklearn"):
    pytest.importorskip(module)

FILES = {"checkpoint.pt", "config.json", "layers.csv", "metrics.csv", "model.safetensors", "report.md", "report.png"}
EPOCHS, STEPS = 3, 12  # of the short run: 1,437 digits in batches of at most 128
SHORT = ["--epochs", str(EPOCHS), "--batch-size", "128", "--seed", "3", "--threads", "1", "--device", "cpu"]

IMAGES = np.zeros((40, 8, 8), dtype=np.uint8)


def train(runs: Path, *options: str) -> int:
    """Exit code of a run in this process; later options win over those of the short run."""
    return cli.main(["train", "--runs", str(runs), *SHORT, *options])


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def make_npz(path: Path, shape: tuple[int, ...], label_shape: tuple[int, ...] = (), **replaced) -> str:
    """40 training and 20 test images whose brightness is their class; ``replaced`` arrays win, None leaves one out."""
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 40), ("test", 20)):
        labels = np.arange(count) % 4
        noise = random.integers(0, 60, (count, *shape))
        arrays[f"x_{part}"] = (noise + 60 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8)
        arrays[f"y_{part}"] = labels.reshape(count, *label_shape)
    arrays.update(replaced)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return str(path)
