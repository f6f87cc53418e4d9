"""``feather-kernels train``: starts or resumes a run, from its options to its files."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from feather_kernels._version import __version__
from feather_kernels.cli.counted import counted
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.interruption import Interrupted
from feather_kernels.cli.options import given
from feather_kernels.cli.train import config as configs
from feather_kernels.cli.train import data, run_folder
from feather_kernels.cli.train.ranks import launched_ranks
from feather_kernels.cli.train.recipe_file import with_recipe
from feather_kernels.cli.train.run_folder import RunFolder
from feather_kernels.cli.train.training import COLUMNS, Training

if TYPE_CHECKING:
    import argparse

    from feather_kernels.cli.interruption import Interruption
    from feather_kernels.cli.train.config import TrainConfig
    from feather_kernels.cli.train.data import Dataset
    from feather_kernels.cli.train.ranks import Ranks

FINISHED, INTERRUPTED = 0, 130  # exit codes
OF_ONE_MACHINE = ("data", "data_dir", "runs", "name", "threads")  # options that may differ between ranks
PACKAGES = ("matplotlib", "numpy", "rich", "safetensors")  # those of the extra ``train`` that every run needs


def run(options: argparse.Namespace) -> int:
    """Start a run, or with ``--resume`` continue one; returns the exit code.

    Raises:
        InputError, OSError: see ``train``, ``resume`` and ``launched_ranks``.
    """
    with launched_ranks() as ranks:
        return _start(given(options), ranks)


def _start(options_given: dict[str, Any], ranks: Ranks) -> int:
    if "resume" not in options_given:
        return train(options_given, ranks)
    path, threads = options_given.pop("resume"), options_given.pop("threads", None)
    if options_given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in options_given)
        raise InputError(f"--resume takes its options from config.json; only --threads may accompany it, got {names}")
    return resume(path, threads, ranks)


def train(options: dict[str, Any], ranks: Ranks) -> int:
    """Start a run and train it to its end; returns the exit code.

    Args:
        options: values by the names of ``TrainConfig``, and ``recipe``. The recipe and defaults supply the others.
        ranks: the processes of the run.

    Raises:
        InputError, OSError: an option, the data or the run folder is not what it should be; nothing has been created.
        InputError: the training loss of an epoch is not finite; the run folder keeps the last checkpoint.
    """
    config = configs.resolve(with_recipe(options))
    if ranks.is_first:
        run_folder.check_free(config)
    dataset = _prepare(config, ranks)
    with ranks.interruption() as interruption:
        training = Training(config, dataset, interruption.check, ranks)
        content, state = {"data": dataset.facts(), "versions": _versions()}, training.state_dict()
        path = ranks.from_first(lambda: run_folder.create(config, content, state).path)
        folder = RunFolder(path, writes=ranks.is_first)
        print(_headline(training, folder) + _absent_classes(dataset), flush=True)
        return _run(training, folder, interruption)


def resume(path: str, threads: int | None, ranks: Ranks) -> int:
    """Continue a run to its end; returns the exit code.

    Args:
        path: the folder of the run, which the first rank reads for all.
        threads: the number of CPU threads; None for that of the run.
        ranks: the processes that continue it, of any number.

    Raises:
        InputError, OSError: the folder does not hold a run, is damaged, or the data have changed.
        InputError: the training loss of an epoch is not finite; the run folder keeps the last checkpoint.
    """
    folder = RunFolder(Path(path), writes=ranks.is_first)
    content, state, finished = ranks.from_first(lambda: _read(folder))
    config = _read_options(folder, content)
    if finished:
        print(f"{path} is finished: {counted(config.epochs, 'epoch')}, results in {', '.join(run_folder.RESULTS)}")
        return FINISHED
    if threads is not None:
        config = replace(config, threads=threads)
    dataset = _prepare(config, ranks)
    if dataset.facts() != content.get("data"):
        raise InputError(
            f"--resume {path} needs the data that it started with, {content.get('data')}, got {dataset.facts()}"
        )
    with ranks.interruption() as interruption:
        training = Training(config, dataset, interruption.check, ranks)
        try:
            training.load_state_dict(state)
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"--resume needs a {run_folder.CHECKPOINT} that belongs to {run_folder.CONFIG}, got "
                f"{folder.path / run_folder.CHECKPOINT}: {reason}"
            ) from error
        print(f"{_headline(training, folder)}; resumed at step {training.step:,}", flush=True)
        return _run(training, folder, interruption)


def _run(training: Training, folder: RunFolder, interruption: Interruption) -> int:
    """Train to the end and write the results; after a signal, write the checkpoint instead."""
    try:
        _train_epochs(training, folder, interruption)
        _finish(training, folder)
    except Interrupted:
        if not training.finalized:
            folder.write_checkpoint(training.state_dict())
            training.ranks.wait()  # a launcher may end the others as soon as one has left
        processes = "" if training.ranks.size == 1 else " in any number of processes"
        print(f"interrupted at step {training.step:,} of {training.total_steps:,}; continue{processes} with")
        print(f"  feather-kernels train --resume {shlex.quote(str(folder.path))}", flush=True)
        return INTERRUPTED
    return FINISHED


def _train_epochs(training: Training, folder: RunFolder, interruption: Interruption) -> None:
    from feather_kernels.cli.train.progress import Progress

    progress = Progress(training)

    def after_step() -> None:
        progress.step()
        interruption.check()

    training.after_step = after_step
    folder.write_metrics(COLUMNS, training.rows)
    try:
        while training.epoch < training.config.epochs:
            row = training.run_epoch()
            folder.write_checkpoint(training.state_dict())
            folder.write_metrics(COLUMNS, training.rows)
            progress.epoch(row)
            interruption.check()
    finally:
        progress.close()
    training.after_step = interruption.check


def _finish(training: Training, folder: RunFolder) -> None:
    """Finalize, evaluate again, and write the results; the figure comes last and marks the run as finished."""
    from safetensors.torch import save

    from feather_kernels.cli.train.figure import draw

    before = training.rows[-1]["test_accuracy"]
    report = training.finalize()
    after = training.evaluate()
    if not folder.writes:
        return
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in training.model.state_dict().items()}
    folder.write(run_folder.MODEL, save(state, metadata={"format": "pt"}))
    folder.write(run_folder.REPORT, (report.to_markdown() + "\n").encode())
    folder.write(run_folder.LAYERS, report.to_csv().encode())
    folder.write(run_folder.FIGURE, draw(training.config, training.rows, report))
    print(f"\n{report}\n")
    print(
        f"test accuracy before finalize {_accuracy(before, after.images)}, "
        f"after {_accuracy(after.accuracy, after.images)}"
    )
    print(f"results are in {folder.path}", flush=True)


def _accuracy(accuracy: float, images: int) -> str:
    return f"{accuracy:.2%} ({round(accuracy * images)} of {images} images)"


def _headline(training: Training, folder: RunFolder) -> str:
    config, prunable = training.config, training.report().numel
    return (
        f"{folder.path}: {config.model} on {config.data_name}, {prunable:,} prunable weights, {config.method}, "
        f"{counted(config.epochs, 'epoch')} of {counted(training.steps_per_epoch, 'step')}, {config.device}"
        f"{f', {training.ranks.size} processes' if training.ranks.size > 1 else ''}"
    )


def _absent_classes(dataset: Dataset) -> str:
    """A second line where classes have no training image, as when labels count from 1; else ""."""
    absent = dataset.absent_classes()
    if not absent:
        return ""
    names = ", ".join(map(str, absent[:5])) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
    return f"\nnote: y_train has no image of {len(absent)} of {dataset.classes} classes: {names} (labels count from 0)"


def _read(folder: RunFolder) -> tuple[dict[str, Any], dict[str, Any], bool]:
    """What the files of a run hold, and whether it is finished."""
    if not folder.path.is_dir():
        raise InputError(f"--resume must be the folder of a run, got {str(folder.path)!r}: no such folder")
    return folder.read_config(), folder.read_checkpoint(), folder.finished


def _read_options(folder: RunFolder, content: dict[str, Any]) -> TrainConfig:
    try:
        return configs.from_json(content.get("options"))
    except InputError as error:
        raise InputError(f"--resume {folder.path}: {run_folder.CONFIG}: {error}") from error


def _prepare(config: TrainConfig, ranks: Ranks) -> Dataset:
    """Check packages, load the data, set the threads, and make convolutions on CUDA deterministic.

    Raises:
        InputError: a package is missing, the data are not what they should be, or the ranks would train other things.
    """
    needed = (*PACKAGES, data.source_of(config.data).module)
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f'train needs {", ".join(missing)}: pip install "feather_kernels[train]"')
    with ranks.one_after_first_of_machine():  # downloads
        dataset = data.load(config.data, config.data_dir)
    shared = {name: value for name, value in asdict(config).items() if name not in OF_ONE_MACHINE}
    ranks.check_same("options", shared)
    ranks.check_same(f"--data {config.data}", dataset.facts())
    torch.backends.cudnn.deterministic = True
    if config.threads != torch.get_num_threads():
        torch.set_num_threads(config.threads)
    return dataset


def _versions() -> dict[str, str]:
    packages = {name: importlib.metadata.version(name) for name in PACKAGES}
    own = {"feather_kernels": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return {**own, **packages}
