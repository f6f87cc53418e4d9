"""Training batches from uint8 images: order, random crop and flip, normalisation.

The order depends on (seed, epoch) only, and the augmentation on (seed, step). So two integers give the position in a
training, and a resumed run sees the same batches as an uninterrupted one. Random numbers are drawn on the CPU, so that
they are the same on every device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor
from torch.nn import functional as F

CROP_PADDING = 4  # pixels
AUGMENTED_SHAPE = (32, 32, 3)  # colour images of CIFAR's size; mirrored digits would be other digits


def steps_per_epoch(images: int, batch_size: int) -> int:
    """The number of batches for ``images`` images, of at most ``batch_size`` each."""
    return math.ceil(images / batch_size)


def epoch_batches(images: int, batch_size: int, seed: int, epoch: int) -> list[Tensor]:
    """The image indices of each batch of an epoch, int64 (B,); sizes differ by at most one, each image comes once."""
    order = torch.randperm(images, generator=_generator(seed, "order", epoch), device="cpu")
    return list(order.tensor_split(steps_per_epoch(images, batch_size)))


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Crop at random after zero padding by 4 pixels, and flip horizontally with probability 1/2.

    Args:
        images: uint8 (B, H, W, C).
        seed: of the run.
        step: the optimizer step, counted from 0.

    Returns:
        uint8 (B, H, W, C).
    """
    count, height, width, _ = images.shape
    generator = _generator(seed, "augmentation", step)
    top, left = torch.randint(2 * CROP_PADDING + 1, (2, count, 1), generator=generator, device="cpu")
    flip = torch.randint(2, (count, 1), generator=generator, device="cpu").bool()
    rows = top + torch.arange(height, device="cpu")
    columns = torch.arange(width, device="cpu").expand(count, width)
    columns = left + torch.where(flip, columns.flip(1), columns)
    padded = F.pad(images, (0, 0, *[CROP_PADDING] * 4))
    device = images.device
    image = torch.arange(count, device=device)[:, None, None]
    return padded[image, rows.to(device)[:, :, None], columns.to(device)[:, None, :]]


class Normalisation:
    """``(x - mean) / std`` with the mean and the standard deviation of each channel of the training images.

    Args:
        images: uint8 (N, H, W, C). The standard deviation of a constant channel is taken as 1.
    """

    def __init__(self, images: Tensor) -> None:
        values = torch.arange(256, dtype=torch.float64, device="cpu")
        counts = [torch.bincount(channel.flatten(), minlength=256).cpu().double() for channel in images.unbind(-1)]
        share = torch.stack(counts) / counts[0].sum()  # (C, 256); counts are exact, so this is the same on every device
        mean = share @ values
        std = (share * (values - mean[:, None]).square()).sum(1).sqrt()
        self.mean = mean.float().to(images.device)
        self.std = torch.where(std > 0, std, 1.0).float().to(images.device)

    def __call__(self, images: Tensor) -> Tensor:
        """Uint8 (B, H, W, C) -> float32 (B, C, H, W) in channels_last."""
        return ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)


def derived_seed(seed: int, purpose: str, index: int) -> int:
    """A seed in [0, 2^63) for one purpose (e.g. "order") at one epoch or step."""
    digest = hashlib.blake2b(f"{seed} {purpose} {index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(seed: int, purpose: str, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(seed, purpose, index))
