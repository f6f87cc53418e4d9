"""Options of ``feather-kernels train`` and ``compare``: those of one run, those of a grid, and those of both."""

from __future__ import annotations

import argparse


def add_train_options(parser: argparse.ArgumentParser) -> None:
    """Every option of one run. The parser leaves out what is not given, so that it can be told from defaults."""
    add = parser.add_argument
    add_shared_options(parser)
    add("--method", metavar="METHOD", help="feather (default), hard, soft, gmp or dense")
    add("--sparsity", type=float, metavar="S", help="final fraction of zeros, in [0, 1) (default 0.95)")
    add("--power", type=float, metavar="P", help="of the thresholding operator, at least 1 or inf (default: METHOD's)")
    add(
        "--grad-scale",
        type=number_or_auto,
        metavar="THETA",
        help="of pruned weights: a number or auto (default: METHOD's)",
    )
    add("--seed", type=int, metavar="N", help="of initialisation, data order and augmentation (default 0)")
    add("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's choice)")
    add("--runs", metavar="DIR", help="folder of all runs (default runs)")
    add("--name", metavar="NAME", help="folder of this run in it (default DATA-MODEL-SPARSITY, numbered if taken)")
    add("--resume", metavar="FOLDER", help="continue an interrupted run; only --threads may be given with it")


def add_compare_options(parser: argparse.ArgumentParser) -> None:
    """A grid, what its cells have in common, and how they run; the parser leaves out what is not given."""
    add = parser.add_argument
    add("grid", metavar="GRID.toml", nargs="?", help="which cells there are (docs/experiments has examples)")
    add("--methods", nargs="+", metavar="METHOD", help="without a grid file (default feather hard soft dense)")
    add("--sparsities", nargs="+", type=float, metavar="S", help="without a grid file (default 0.9 0.95 0.98)")
    add("--seeds", nargs="+", type=int, metavar="N", help="without a grid file (default 0)")
    add("--jobs", type=int, metavar="N", help="cells that run side by side (default 1)")
    add("--threads", type=int, metavar="N", help="CPU threads of each cell (default 1)")
    add("--out", metavar="FOLDER", help="of the grid (default runs/GRID, or runs/compare)")
    add("--table", metavar="FOLDER", help="only write table and figures anew, from results.csv and layers.csv there")
    add_shared_options(parser)


def add_shared_options(parser: argparse.ArgumentParser) -> None:
    """What all runs of a comparison have in common."""
    add = parser.add_argument
    add("--recipe", metavar="RECIPE", help="options to begin with: cifar100-resnet20 and others, or a .toml file")
    add("--data", metavar="DATA", help="digits (default), fashion-mnist, cifar10, cifar100, or an .npz file")
    add("--data-dir", metavar="DIR", help="folder for downloads (default data)")
    add("--model", metavar="MODEL", help="cnn (default), resnet20, mobilenetv1, densenet40-24, torchvision:NAME, ...")
    add("--epochs", type=int, metavar="N", help="default 30; 160 for cifar10 and cifar100")
    add("--batch-size", type=int, metavar="N", help="images per step (default 128; 64 for digits and most .npz files)")
    add("--lr", type=float, metavar="LR", help="learning rate, cosine to 0 (default 0.1)")
    add("--momentum", type=float, metavar="M", help="of SGD (default 0.9)")
    add("--weight-decay", type=float, metavar="WD", help="on weights, not on norms and biases (default 5e-4)")
    add("--clip", type=float, metavar="NORM", help="largest norm of the gradient (default 3; inf: any)")
    add("--dtype", metavar="DTYPE", help="float32 (default), or bfloat16 for autocast")
    add("--device", metavar="DEVICE", help="default cuda if available, else cpu")


def number_or_auto(text: str) -> float | str:
    """A gradient scale; ValueError if the text is none."""
    return text if text == "auto" else float(text)
