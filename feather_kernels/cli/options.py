"""The options of every command.

Those of ``train`` and ``compare`` have no defaults here: what is not given comes from the recipe or from
``train.config``. So ``given`` holds exactly what the user wrote.
"""

from __future__ import annotations

import argparse
from typing import Any


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The options that the user gave, by name."""
    return {name: value for name, value in vars(options).items() if name != "command"}


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Describe one run: its method, its seed, its folder, and all that ``compare`` takes too."""
    _leave_out_defaults(parser)
    add = parser.add_argument
    _add_shared_options(parser)
    add("--method", metavar="METHOD", help="feather (default), hard, soft, gmp or dense")
    add("--sparsity", type=float, metavar="S", help="final fraction of zeros, in [0, 1) (default 0.95)")
    add(
        "--power",
        type=float,
        metavar="P",
        help="exponent of Feather's thresholding operator, at least 1; inf allowed (default 3)",
    )
    add(
        "--grad-scale",
        type=number_or_auto,
        metavar="THETA",
        help="factor of the gradient at pruned weights: a number or auto (default: the method's)",
    )
    add("--seed", type=int, metavar="N", help="seeds initialisation, data order and augmentation (default 0)")
    add("--threads", type=int, metavar="N", help="number of CPU threads (default: torch's choice)")
    add("--runs", metavar="DIR", help="folder that holds all runs (default runs)")
    add("--name", metavar="NAME", help="folder of this run in it (default DATA-MODEL-SPARSITY, numbered if taken)")
    add("--resume", metavar="FOLDER", help="continue an interrupted run; only --threads may accompany it")


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """Describe a grid, what its cells have in common, and how they run."""
    _leave_out_defaults(parser)
    add = parser.add_argument
    add("grid", metavar="GRID.toml", nargs="?", help="file that lists the cells (docs/experiments has examples)")
    add(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="methods to compare, without a grid file (default feather hard soft dense)",
    )
    add(
        "--sparsities",
        nargs="+",
        type=float,
        metavar="S",
        help="their sparsities, without a grid file (default 0.9 0.95 0.98)",
    )
    add("--seeds", nargs="+", type=int, metavar="N", help="their seeds, without a grid file (default 0)")
    add("--jobs", type=int, metavar="N", help="number of cells that run at the same time (default 1)")
    add("--threads", type=int, metavar="N", help="CPU threads of each cell (default 1)")
    add(
        "--out",
        metavar="FOLDER",
        help="folder of the results, from which the grid is also continued (default runs/GRID, or runs/compare)",
    )
    add("--table", metavar="FOLDER", help="train nothing: redraw table and figures from results.csv and layers.csv")
    _add_shared_options(parser)


def add_warmup_options(parser: argparse.ArgumentParser) -> None:
    """Say what to compile for."""
    add = parser.add_argument
    add("--dtype", metavar="DTYPE", nargs="+", help="dtypes of weights (default float32 bfloat16 float16)")
    add("--device", metavar="DEVICE", nargs="+", help="devices to compile for (default: every CUDA device)")


def add_selftest_options(parser: argparse.ArgumentParser) -> None:
    """Say what to test, and which files to write."""
    add = parser.add_argument
    add("--device", metavar="DEVICE", help="device to test (default cuda if available, else cpu)")
    add("--require", metavar="BACKEND", nargs="+", default=[], help="fail if one of these backends cannot run")
    add("--json", metavar="FILE", help="also write the result to this file")
    add("--junit", metavar="FILE", help="also write the result as JUnit XML, for CI")


def add_gpu_report_options(parser: argparse.ArgumentParser) -> None:
    """Say what to measure, and which files to write."""
    add = parser.add_argument
    add("--device", metavar="DEVICE", default="cuda", help="cuda (default) or cuda:N")
    add("--output", metavar="DIR", default=".", help="folder for gpu-report-NAME.json and .md (default: this one)")
    add("--name", metavar="NAME", help="NAME in the names of the files (default: the GPU's)")
    add("--quick", action="store_true", help="use small inputs and few rounds")
    add("--force", action="store_true", help="overwrite existing files")
    add("--table", metavar="FILE", nargs="+", help="run nothing: print one page from the reports in these JSON files")


def add_no_options(parser: argparse.ArgumentParser) -> None:
    """For a command without options."""


def number_or_auto(text: str) -> float | str:
    """A gradient scale; raises ValueError unless the text is a number or "auto"."""
    return text if text == "auto" else float(text)


def _leave_out_defaults(parser: argparse.ArgumentParser) -> None:
    parser.argument_default = argparse.SUPPRESS


def _add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What ``train`` and ``compare`` both take: data, model and optimizer."""
    add = parser.add_argument
    add("--recipe", metavar="RECIPE", help="start from these options: cifar100-resnet20, ... or a .toml file")
    add("--data", metavar="DATA", help="digits (default), fashion-mnist, cifar10, cifar100 or an .npz file")
    add("--data-dir", metavar="DIR", help="folder for downloads (default data)")
    add("--model", metavar="MODEL", help="cnn (default), resnet20, mobilenetv1, densenet40-24, torchvision:NAME, ...")
    add("--epochs", type=int, metavar="N", help="number of epochs (default 30; 160 for cifar10 and cifar100)")
    add("--batch-size", type=int, metavar="N", help="images per step (default 128; 64 for digits and most .npz files)")
    add("--lr", type=float, metavar="LR", help="peak learning rate; a cosine takes it to 0 (default 0.1)")
    add("--momentum", type=float, metavar="M", help="momentum of SGD (default 0.9)")
    add("--weight-decay", type=float, metavar="WD", help="decay of weights, not of norms and biases (default 5e-4)")
    add("--clip", type=float, metavar="NORM", help="largest gradient norm (default 3; inf turns clipping off)")
    add("--dtype", metavar="DTYPE", help="float32 (default), or bfloat16 for autocast")
    add("--device", metavar="DEVICE", help="device to train on (default cuda if available, else cpu)")
