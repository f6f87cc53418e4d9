"""ResNet-50 on ImageNet, trained to 90 % sparsity with Feather.

    torchrun --nproc-per-node 8 examples/imagenet_resnet50.py /data/imagenet --sparsity 0.9 --batch-size 128
    python examples/imagenet_resnet50.py /data/imagenet --output runs/imagenet --resume

This is the field's recipe for the setting in which the Feather paper (BMVC 2023) reports 76.93 % top-1 at 90 %
sparsity: 100 epochs of SGD, learning rate 0.1 per 256 images, 5 epochs of warm-up and then a cosine to 0, momentum 0.9,
weight decay 5e-5 on the weights of layers, label smoothing 0.1, random resized crops and mirroring. It was NEVER run on
ImageNet, only on a handful of made-up images, so whether it reaches the paper's figure is not known.

The data folder must hold ``train/CLASS/*.JPEG`` and ``val/CLASS/*.JPEG``. The output folder gets ``checkpoint.pt``
after each epoch, from which ``--resume`` continues, and ``model.pt`` at the end: the state_dict of torchvision's
ResNet-50 with zeros in it. Needs torchvision, which ``pip install ".[train]"`` installs.

Search for "sparsifier" to see all that sparse training adds to a dense training script.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision.datasets import ImageFolder
from torchvision.models import resnet50
from torchvision.transforms import v2

import feather_kernels as fk

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, in [0, 1]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
RANK = int(os.environ.get("RANK", 0))  # torchrun sets these
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
CHECKPOINT = "checkpoint.pt"
MODEL = "model.pt"
FREE_ON_RESUME = ("data", "output", "resume", "compile", "workers", "device")  # options that may change then


class InputError(Exception):
    """The options or the files are wrong; shown as one line."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="ResNet-50 on ImageNet, trained to be sparse with Feather")
    add = parser.add_argument
    add("data", type=Path, help="folder with train/CLASS and val/CLASS")
    add("--output", type=Path, default=Path("runs/imagenet-resnet50"), help="folder of checkpoint.pt and model.pt")
    add("--resume", action="store_true", help="continue from the checkpoint in --output")
    add("--sparsity", type=float, default=0.9, help="fraction of zeros among the weights of layers, in [0, 1)")
    add("--epochs", type=int, default=100)
    add("--warmup-epochs", type=int, default=5, help="epochs in which the learning rate rises")
    add("--batch-size", type=int, default=256, help="images per process and step")
    add("--lr", type=float, default=0.1, help="learning rate per 256 images of a step, over all processes")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-5, help="on weights of layers; biases and norms have none")
    add("--label-smoothing", type=float, default=0.1)
    add("--image-size", type=int, default=224, help="pixels")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of autocast; float16 scales the loss (GradScaler)")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile, by default with inductor")
    add("--workers", type=int, default=8, help="data loading processes per process")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if not 0 <= options.warmup_epochs < options.epochs:
        parser.error(f"--warmup-epochs must be in [0, {options.epochs}), got {options.warmup_epochs}")
    if not 0 <= options.sparsity < 1:
        parser.error(f"--sparsity must be in [0, 1), got {options.sparsity} (a fraction of zeros)")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    return options


# ---------------------------------------------------------------------------------------------------------- images


def load_image(path: str) -> Image.Image:
    """Decode an image to RGB; raises InputError, which names the file, if that fails."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as PIL's decoders raise
        raise InputError(f"image cannot be decoded: {path}: {error}".replace("\n", " ")) from error


def image_folder(folder: Path, transforms: Sequence[nn.Module]) -> ImageFolder:
    """Images by class; raises InputError if the folder or the images of a class are missing."""
    to_tensor = v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)
    try:
        return ImageFolder(str(folder), v2.Compose([*transforms, *to_tensor]), loader=load_image)
    except OSError as error:  # torchvision names the classes without an image
        raise InputError(f"images must lie in {folder}/CLASS: {error}".replace("\n", " ")) from error


def make_loaders(options: argparse.Namespace) -> tuple[DataLoader, DataLoader, int]:
    """This process's share of the training and validation images, and the number of classes.

    Each process evaluates other images, none of them twice, so that the accuracy counts each image once.
    """
    size = options.image_size
    train = image_folder(options.data / "train", [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()])
    val = image_folder(options.data / "val", [v2.Resize(size * 256 // 224), v2.CenterCrop(size)])
    different = sorted(set(train.classes) ^ set(val.classes))  # would shift the numbers of all classes after it
    if different:
        missing = options.data / ("train" if different[0] in val.classes else "val") / different[0]
        raise InputError(f"train and val must have the same class folders: {missing} is missing")
    common = {
        "batch_size": options.batch_size,
        "num_workers": options.workers,
        "pin_memory": options.device.startswith("cuda"),
    }
    sampler: DistributedSampler = DistributedSampler(
        train, WORLD_SIZE, RANK, seed=options.seed, drop_last=WORLD_SIZE > 1
    )
    train_loader = DataLoader(train, sampler=sampler, drop_last=True, **common)
    if len(train_loader) == 0:
        raise InputError(
            f"--batch-size must be at most the {len(train)} training images divided by {WORLD_SIZE} processes, "
            f"got {options.batch_size}"
        )
    val_share = Subset(val, range(RANK, len(val), WORLD_SIZE))
    return train_loader, DataLoader(val_share, **common), len(train.classes)


# -------------------------------------------------------------------------------------------------------- training


class Trainer:
    """Model, optimizer, scheduler, scaler and sparsifier: one epoch, one evaluation, and their checkpoint."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device, LOCAL_RANK) if options.device == "cuda" else options.device
        self.train_images, self.val_images, classes = make_loaders(options)
        self.epoch = 0  # finished ones
        self.steps_per_epoch = len(self.train_images)
        total_steps = options.epochs * self.steps_per_epoch
        warmup_steps = options.warmup_epochs * self.steps_per_epoch

        def lr_factor(step: int) -> float:
            if step < warmup_steps:
                return (step + 1) / warmup_steps
            return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps)))

        torch.manual_seed(options.seed)
        self.model = resnet50(num_classes=classes).to(self.device, memory_format=torch.channels_last)
        self.sparsifier = fk.Sparsifier(self.model, sparsity=options.sparsity, total_steps=total_steps)
        self.trained: Any = self.model  # the same weights, in the wrappers of training
        if WORLD_SIZE > 1:
            self.trained = DistributedDataParallel(self.model)
        if options.compile:
            self.trained = torch.compile(self.trained, backend=options.compile)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.SGD(
            [
                {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
                {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
            ],
            lr=options.lr * options.batch_size * WORLD_SIZE / 256,
            momentum=options.momentum,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor)
        self.scaler = torch.amp.GradScaler(torch.device(self.device).type, enabled=options.dtype == "float16")

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """(B, 3, H, W) on the host -> (B, classes), float32."""
        images = images.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        dtype = DTYPES[self.options.dtype]
        with torch.autocast(
            images.device.type, torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype != torch.float32
        ):
            logits: Tensor = model(images)
        return logits.float()

    def train_epoch(self) -> float:
        """Train for an epoch; returns the mean loss over all processes."""
        self.train_images.sampler.set_epoch(self.epoch)  # type: ignore[attr-defined]
        torch.manual_seed((self.options.seed * 1000 + self.epoch) * WORLD_SIZE + RANK)  # crops: as before on --resume
        self.model.train()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for images, labels in self.train_images:
            labels = labels.to(self.device, non_blocking=True)
            logits = self.logits(self.trained, images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.options.label_smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            scale = self.scaler.get_scale()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scaler.get_scale() >= scale:  # else the gradients were infinite and the step was skipped
                self.scheduler.step()
                self.sparsifier.step()
            total += loss.detach()
        mean = sum_over_processes(total).item() / (self.steps_per_epoch * WORLD_SIZE)
        if not math.isfinite(mean):
            raise InputError(f"training loss must be finite, got {mean} in epoch {self.epoch + 1} (a smaller --lr?)")
        if WORLD_SIZE > 1:
            for buffer in self.model.buffers():  # running statistics differ by process since the last forward
                dist.broadcast(buffer, 0)
        self.epoch += 1
        return mean

    @torch.no_grad()
    def evaluate(self) -> float:
        """Top-1 accuracy over all validation images, in percent."""
        self.model.eval()
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)  # correct, all
        for images, labels in self.val_images:
            correct = self.logits(self.model, images).argmax(1) == labels.to(self.device)
            counts += torch.stack([correct.sum(), torch.tensor(len(labels), device=self.device)])
        correct_total, images_total = sum_over_processes(counts).tolist()
        return float(100 * correct_total / images_total)

    # ---------------------------------------------------------------------------------------------------- resume

    def parts(self) -> dict[str, Any]:
        """What has a state_dict, by its name in the checkpoint."""
        return {name: getattr(self, name) for name in ("model", "optimizer", "scheduler", "sparsifier", "scaler")}

    def facts(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one before."""
        options = {name: value for name, value in vars(self.options).items() if name not in FREE_ON_RESUME}
        facts = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        return {**facts, "number of processes": WORLD_SIZE, "steps per epoch": self.steps_per_epoch}

    def save(self) -> None:
        """Write the checkpoint; all processes have the same state, the first writes it."""
        states = {name: part.state_dict() for name, part in self.parts().items()}
        write(self.options.output / CHECKPOINT, {**states, "epoch": self.epoch, "facts": self.facts()})

    def resume(self) -> None:
        """Continue after the last epoch that was saved; raises InputError if the checkpoint is of another run."""
        path = self.options.output / CHECKPOINT
        if not path.is_file():
            raise InputError(f"--resume needs {path}, which is missing")
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self.facts().items():
            if saved["facts"][name] != value:
                raise InputError(f"--resume must continue with the same {name}: {saved['facts'][name]}, got {value}")
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.epoch = saved["epoch"]


def sum_over_processes(values: Tensor) -> Tensor:
    """Add up a tensor over the processes, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(values)
    return values


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a file in the first process: under a temporary name, flushed to the disk, then renamed."""
    if RANK > 0:
        return
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def say(text: str) -> None:
    """Print a line in the first process."""
    if RANK == 0:
        print(text, flush=True)


def run(options: argparse.Namespace) -> nn.Module:
    """Train, finalize, evaluate and write the model, which is returned."""
    if not options.resume and (options.output / CHECKPOINT).exists():
        raise InputError(f"--output must be a new folder, got {options.output}, which holds a run (--resume?)")
    trainer = Trainer(options)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.resume:
        trainer.resume()
    while trainer.epoch < options.epochs:
        begin = time.perf_counter()
        loss = trainer.train_epoch()
        accuracy = trainer.evaluate()
        trainer.save()
        say(
            f"epoch {trainer.epoch}/{options.epochs}: loss {loss:.4f}, top-1 {accuracy:.2f} %, "
            f"sparsity {trainer.sparsifier.sparsity:.4f}, {time.perf_counter() - begin:.0f} s"
        )
    trainer.sparsifier.finalize()  # zeros in the weights, plain layers
    report = trainer.sparsifier.report()
    write(options.output / MODEL, trainer.model.state_dict())
    say(f"final: top-1 {trainer.evaluate():.2f} %, sparsity {report.sparsity:.4f}")
    return trainer.model


def main(arguments: Sequence[str] | None = None) -> None:
    """Run as the command line says, in each process of torchrun."""
    options = parse(arguments)
    if RANK > 0:
        warnings.simplefilter("ignore")  # the first process shows the same
    if options.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
    try:
        run(options)
    except InputError as error:  # from a worker it comes with the worker's traceback; its last line is the message
        print(f"error: {str(error).strip().rpartition('InputError: ')[2]}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None  # torchrun ends the other processes
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
