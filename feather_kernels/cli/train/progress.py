"""The progress of a training run: bars on a terminal, and one plain line per epoch."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from feather_kernels.cli.train.training import Row, Training

REFRESH_SECONDS = 0.2  # reading the loss makes the host wait for the device


class Progress:
    """Prints a line per epoch, and on a terminal shows two bars, for all steps and for those of the epoch.

    The bars show loss, accuracy, sparsity, images/s and the time left.

    Args:
        training: at its first step or where it is resumed.
    """

    def __init__(self, training: Training) -> None:
        from rich import progress
        from rich.console import Console

        self.training = training
        self.bars = progress.Progress(
            progress.TextColumn("{task.description:<8}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            progress.TimeRemainingColumn(),
            console=Console(),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.all_steps = self.bars.add_task("training", total=training.total_steps, completed=training.step, text="")
        self.epoch_steps = self.bars.add_task("", total=training.steps_per_epoch, text="")
        self.first_step, self.begin, self.shown = training.step, time.perf_counter(), 0.0
        self.bars.start()

    def step(self) -> None:
        """Refresh the bars, a few times per second; call this after each step and each batch of an evaluation."""
        if self.bars.disable or time.perf_counter() - self.shown < REFRESH_SECONDS:
            return
        training, sums = self.training, self.training.sums
        images = training.images_per_epoch * (training.step - self.first_step) / training.steps_per_epoch
        speed = images / (time.perf_counter() - self.begin)
        text = f"sparsity {training.sparsity:.4f}  {speed:,.0f} images/s"
        self.bars.update(self.all_steps, completed=training.step, text=text)
        epoch = f"epoch {training.epoch + 1}"
        text = f"loss {sums.mean_loss:.4f}  accuracy {sums.accuracy:.2%}"
        self.bars.update(self.epoch_steps, completed=training.epoch_step, text=text, description=epoch)
        self.shown = time.perf_counter()

    def epoch(self, row: Row) -> None:
        """Print the line of a finished epoch above the bars."""
        self.bars.console.print(_epoch_line(self.training, row), markup=False, highlight=False, soft_wrap=True)
        self.bars.reset(self.epoch_steps)

    def close(self) -> None:
        """Remove the bars."""
        if not self.bars.disable:  # without bars, rich 13 would print an empty line
            self.bars.stop()


def _epoch_line(training: Training, row: Row) -> str:
    """The numbers of an epoch in one line; images/s includes the evaluation."""
    epochs = training.config.epochs
    speed = training.images_per_epoch / row["seconds"] if row["seconds"] else 0.0
    return (
        f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}  "
        f"train loss {row['train_loss']:.4f} accuracy {row['train_accuracy']:.2%}  "
        f"test loss {row['test_loss']:.4f} accuracy {row['test_accuracy']:.2%}  "
        f"sparsity {row['sparsity']:.4f}  threshold {row['threshold']:.3g}  {speed:,.0f} images/s"
    )
