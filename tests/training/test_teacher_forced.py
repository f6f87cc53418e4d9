"""200 steps of a ResNet-20, each equal to an independent implementation of the method from the same state."""

from __future__ import annotations

import math

import pytest
import torch

from feather_kernels.cli.train.models import make_model
from tests.support.teacher import SPARSITY, train_beside_teacher


@pytest.mark.parametrize("recompute", [None, True], ids=["kept", "recomputed"])
def test_200_steps_of_resnet20(recompute: bool | None) -> None:
    torch.manual_seed(0)
    model = make_model("resnet20-16", channels=3, classes=10, seed=0)
    labels = torch.arange(64) % 10
    images = torch.randn(10, 3, 16, 16)[labels] + 0.3 * torch.randn(64, 3, 16, 16)
    seen = train_beside_teacher(model, images, labels, steps=200, batch_size=16, recompute=recompute)
    assert seen.largest_error <= 2, "ulps of P(w), a relative error of eps being at least half and at most one ulp"
    assert seen.zeros >= math.floor((seen.weights - 1) * SPARSITY) + 1
    assert seen.loss < 1.0, f"it must train, not only agree: loss {seen.loss}"
