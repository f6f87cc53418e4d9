"""A small net trains with every op executed as PTX; each step equals an independent implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.conftest import PTX_ARCHITECTURE, BackendUnderTest
from tests.support import nets
from tests.support.teacher import SPARSITY, train_beside_teacher

pytestmark = pytest.mark.skipif(not PTX_ARCHITECTURE, reason="needs the PTX executor")

STEPS, LAYERS = 20, 5
KERNELS = {"threshold_kernel": STEPS * LAYERS, "scale_kernel": STEPS * LAYERS, "bracket_kernel": STEPS // 2}


def launched(executor: Any, kernel: str) -> Sequence[Any]:
    return [report for report in executor.launches if report.kernel == kernel]


def test_20_steps_beside_the_teacher(backend: BackendUnderTest, executor: Any) -> None:
    model, images = nets.conv_net(), nets.images(10)
    torch.manual_seed(0)
    seen = train_beside_teacher(model, images, torch.arange(10), steps=STEPS, batch_size=8)
    assert seen.largest_error <= 2, "ulps of P(w)"
    assert seen.zeros >= math.floor((seen.weights - 1) * SPARSITY) + 1
    for kernel, least in KERNELS.items():
        assert len(launched(executor, kernel)) >= least, kernel
    assert all(report.bytes_read for report in launched(executor, "threshold_kernel"))
