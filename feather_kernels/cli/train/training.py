"""The training loop: model, optimizer, schedule and sparsifier, one epoch, one evaluation, and their state.

It follows the paper's code for CIFAR-100: SGD with momentum, a cosine to 0, weight decay on weights only (on the dense,
latent ones), and a gradient norm that is clipped after the gradients of pruned weights have been scaled.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import batches, methods
from feather_kernels.cli.train.config import DTYPES, TrainConfig
from feather_kernels.cli.train.models import is_torchvision, make_model
from feather_kernels.cli.train.ranks import Ranks
from feather_kernels.errors import SparsityWarning
from feather_kernels.sparsify import Report, Sparsifier

if TYPE_CHECKING:
    from feather_kernels.cli.train.data import Dataset

TEST_BATCH_SIZE = 256  # images for each rank
ALONE = Ranks()

COLUMNS = (
    *("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy"),
    *("sparsity_target", "sparsity", "threshold", "lr", "seconds"),
)
Row = dict[str, int | float]


@dataclass
class Sums:
    """Sums over the images that this process has seen so far.

    Attributes:
        loss: in nats. It stays on the device until it is read, so that a step does not wait for it.
        correct: the number of correct answers, which also stays on the device.
        images: the number of images.
        seconds: the time that they took.
    """

    loss: Tensor | float = 0.0
    correct: Tensor | int = 0
    images: int = 0
    seconds: float = 0.0

    @property
    def mean_loss(self) -> float:
        """The mean cross-entropy per image, in nats; 0 before the first image."""
        return float(self.loss) / max(self.images, 1)

    @property
    def accuracy(self) -> float:
        """The fraction of correct answers; 0 before the first image."""
        return int(self.correct) / max(self.images, 1)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss (0-dim), its logits (B, classes) and labels (B,)."""
        self.loss = self.loss + loss.detach().double() * len(labels)
        self.correct = self.correct + (logits.detach().argmax(1) == labels).sum()
        self.images += len(labels)


class Training:
    """A training run in memory; it starts at step 0 or where ``load_state_dict`` puts it.

    Args:
        config: the options.
        dataset: the data, on any device.
        after_step: called after each optimizer step and each batch of an evaluation. It may raise: ``state_dict`` can
            then save the training, and a later ``run_epoch`` continues it. All ranks call it equally often.
        ranks: the processes that train together. All must call the methods of this class that train, evaluate, or
            give a state.

    Attributes:
        step: the number of optimizer steps done.
        rows: one for each finished epoch, with the keys of ``COLUMNS``.
        sums: over this rank's images of the current epoch.
        finalized: whether ``finalize`` has been called.

    Raises:
        InputError: the model does not take the images, batch norm has a single value to normalise, or a rank has no
            image in a step.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, after_step: Callable[[], None], ranks: Ranks = ALONE
    ) -> None:
        self.config = config
        self.after_step = after_step
        self.ranks = ranks
        self.device = ranks.device(config.device)
        self.images, self.labels = dataset.x_train.to(self.device), dataset.y_train.to(self.device)
        self.test_images, self.test_labels = dataset.x_test.to(self.device), dataset.y_test.to(self.device)
        self.normalise = batches.Normalisation(self.images)
        self.augments = dataset.image_shape == batches.AUGMENTED_SHAPE
        self.steps_per_epoch = batches.steps_per_epoch(len(self.images), config.batch_size)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.method = config.settings

        model = make_model(config.model, dataset.image_shape[-1], dataset.classes, config.seed)
        smallest_share = _smallest_share(config, len(self.images), self.steps_per_epoch, ranks.size)
        _check_takes(model, config, dataset, smallest_share)
        self.model: nn.Module = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sparsifier = self._make_sparsifier()
        self.parallel = ranks.replicate(self.model, self.device)
        self.optimizer = torch.optim.SGD(_parameter_groups(self.model, config), lr=config.lr, momentum=config.momentum)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.step = 0
        self.rows: list[Row] = []
        self.sums = Sums()
        self.finalized = False

    def _make_sparsifier(self) -> Sparsifier | None:
        if not self.method.prunes:
            return None
        return Sparsifier(
            self.model,
            sparsity=self.config.sparsity,
            total_steps=self.total_steps,
            power=self.method.power,
            grad_scale=self.method.grad_scale,
        )

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that the schedule asks for at this step; 0 if the method prunes nothing."""
        return 0.0 if self.sparsifier is None else self.sparsifier.sparsity

    def report(self) -> Report:
        """The current report: layers and their zeros."""
        return methods.dense_report(self.model) if self.sparsifier is None else self.sparsifier.report()

    @property
    def epoch(self) -> int:
        """The number of finished epochs, evaluation included."""
        return len(self.rows)

    @property
    def epoch_step(self) -> int:
        """The number of optimizer steps done in the current epoch."""
        return self.step - self.epoch * self.steps_per_epoch

    @property
    def images_per_epoch(self) -> int:
        """The number of training images."""
        return len(self.images)

    def run_epoch(self) -> Row:
        """Train to the end of the current epoch, evaluate, and append the epoch's row to ``rows``.

        Raises:
            InputError: the mean training loss of the epoch is not finite; no row has been appended.
        """
        order = batches.epoch_batches(len(self.images), self.config.batch_size, self.config.seed, self.epoch)
        self.model.train()
        for batch in order[self.epoch_step :]:
            begin = time.perf_counter()
            self.train_step(batch.to(self.device))
            self.sums.seconds += time.perf_counter() - begin
            self.after_step()
        train = self._total(self.sums)
        self._check_loss(train)
        begin = time.perf_counter()
        test = self.evaluate()
        train.seconds += time.perf_counter() - begin
        self.rows.append(self._row(train, test))
        self.sums = Sums()
        return self.rows[-1]

    def train_step(self, batch: Tensor) -> None:
        """Take one optimizer step on the images with these indices, int64 (B,) on the device; the ranks share them."""
        images, labels = self.images[batch], self.labels[batch]
        ranks = self.ranks
        if is_torchvision(self.config.model):  # whose dropout and stochastic depth draw from torch's own generator
            torch.manual_seed(batches.derived_seed(self.config.seed, "model", self.step * ranks.size + ranks.rank))
        if self.augments:  # the whole batch: a crop must not depend on the number of ranks
            images = batches.augment(images, self.config.seed, self.step)
        images, labels = ranks.share(images), ranks.share(labels)
        logits = self._logits(self.parallel, self.normalise(images))
        loss = F.cross_entropy(logits, labels)
        # gradients are averaged over the ranks, whatever the sizes of their shares
        (loss * (len(labels) * ranks.size / len(batch))).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        with self._held_weights():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        self.step += 1
        self.sums.add(loss, logits, labels)

    @torch.no_grad()
    def evaluate(self) -> Sums:
        """Compute loss and accuracy over the test images."""
        self.model.eval()
        self.ranks.copy_from_first(self.model.buffers())  # the running statistics, which checkpoints and results hold
        sums = Sums()
        size = TEST_BATCH_SIZE * self.ranks.size
        for batch in zip(self.test_images.split(size), self.test_labels.split(size), strict=True):
            images, labels = map(self.ranks.share, batch)
            if len(images) > 0:  # fewer images than ranks may be left
                logits = self._logits(self.model, self.normalise(images))
                sums.add(F.cross_entropy(logits, labels), logits, labels)
            self.after_step()
        return self._total(sums)

    def finalize(self) -> Report:
        """Write the zeros into the weights, which leaves a dense model, and report; no ``state_dict`` comes later.

        Raises:
            RuntimeError: the ranks have not trained the same weights.
        """
        self.finalized = True
        if self.sparsifier is not None:
            if self.ranks.size > 1:
                self.sparsifier.assert_consistent()
            with warnings.catch_warnings():  # the report names empty layers; an option for min_density does not exist
                warnings.filterwarnings("ignore", "these layers have no weight left", SparsityWarning)
                self.sparsifier.finalize()
        return self.report()

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, which torch.load reads with weights_only=True."""
        return {
            **{name: part.state_dict() for name, part in self._stateful().items()},
            "step": self.step,
            "rows": self.rows,
            "sums": asdict(self._total(self.sums)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit on the CPU with as many threads and at most two ranks.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: the state belongs to another run.
        """
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])
        self.step, self.rows = state["step"], list(state["rows"])
        sums = Sums(**state["sums"])
        self.sums = sums if self.ranks.is_first else Sums()  # they are sums over all ranks
        if not 0 <= self.epoch_step <= self.steps_per_epoch or self.step > self.total_steps:
            raise ValueError(f"step {self.step} is not in epoch {self.epoch}, of {self.steps_per_epoch} steps each")

    def _held_weights(self) -> AbstractContextManager[None]:
        """A context that holds the weights which the optimizer must not change in this step."""
        if self.sparsifier is None or not self.method.holds_pruned:
            return nullcontext()
        return methods.hold_pruned(self.sparsifier)

    def _stateful(self) -> dict[str, Any]:
        """The objects with a state_dict, by their names in the checkpoint."""
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return parts if self.sparsifier is None else {**parts, "sparsifier": self.sparsifier}

    def _total(self, sums: Sums) -> Sums:
        """The sums over all ranks, as plain numbers; the time is that of this rank."""
        loss, correct, images = self.ranks.add([float(sums.loss), int(sums.correct), sums.images])
        return Sums(loss, int(correct), int(images), sums.seconds)

    def _check_loss(self, sums: Sums) -> None:
        """Raise InputError if the loss is not finite; once per epoch, because reading it makes the host wait."""
        loss = sums.mean_loss
        if not math.isfinite(loss):
            raise InputError(
                f"training loss must be finite, got {loss} in epoch {self.epoch + 1} with --lr {self.config.lr} "
                "(start a new run with a smaller --lr)"
            )

    def _logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, classes), float32."""
        dtype = DTYPES[self.config.dtype]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=dtype != torch.float32):
            logits: Tensor = model(images)
        return logits.float()

    def _lr_factor(self, step: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * step / self.total_steps))

    def _row(self, train: Sums, test: Sums) -> Row:
        report = self.report()
        threshold = 0.0 if self.sparsifier is None else self.sparsifier.threshold.item()
        values = (
            *(self.epoch + 1, self.step, train.mean_loss, train.accuracy, test.mean_loss, test.accuracy),
            *(report.target_sparsity, report.sparsity, threshold),
            *(self.config.lr * self._lr_factor(self.step - 1), round(train.seconds, 3)),
        )
        return dict(zip(COLUMNS, values, strict=True))


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Two groups: weights of layers, which decay, and vectors (biases and norms), which do not."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def _smallest_share(config: TrainConfig, images: int, steps: int, ranks: int) -> int:
    """The smallest number of images that a rank gets in a step; raises InputError if it is 0.

    A rank without images could not take part in the step: batch norm, for one, has nothing to normalise.
    """
    smallest_batch = images // steps
    if smallest_batch < ranks:
        raise InputError(
            f"--batch-size must give each of the {ranks} ranks an image in every step, got {config.batch_size} for "
            f"{images} images, of which a step has {smallest_batch}"
        )
    return smallest_batch // ranks


def _check_takes(model: nn.Module, config: TrainConfig, dataset: Dataset, batch_size: int) -> None:
    """Raise InputError unless a copy of the model can train on a batch of so many images."""
    height, width, channels = dataset.image_shape
    images = torch.zeros(batch_size, channels, height, width, dtype=torch.float32, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            logits = copy.deepcopy(model).train()(images)
        except (AssertionError, RuntimeError, ValueError) as error:  # raised by networks for sizes they do not take
            if "more than 1 value per channel" in str(error):  # raised by torch's batch norm
                raise InputError(
                    f"--batch-size must leave no batch, and no rank's share of one, with a single image where "
                    f"{config.model} makes one pixel of {height}x{width} (batch norm), got {config.batch_size} for "
                    f"{len(dataset.x_train)} images"
                ) from error
            raise InputError(f"--model {config.model} does not take images of {height}x{width}: {error}") from error
    if not isinstance(logits, Tensor):
        raise InputError(f"--model must return one tensor in training, got {type(logits).__name__} of {config.model}")
