"""The PTX executor runs Triton kernels of another library, whose values torch can check.

Nine of Liger-Kernel's, forward and backward, as its own autograd functions launch them. They show that the executor
takes more than this package's kernels, and that what it reports is there. `pip install liger-kernel --no-deps`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (the extra `peers`)")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.group_norm import LigerGroupNormFunction
from liger_kernel.ops.kl_div import LigerKLDivLossFunction
from liger_kernel.ops.layer_norm import LigerLayerNormFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.softmax import LigerSoftmaxFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction

from tools.ptx_executor.driver import simulated_gpu
from tools.ptx_executor.errors import DataRaceError

ROWS, COLUMNS, EPS = 3, 300, 1e-5  # several elements a thread: see the last test
ARCHITECTURES = (80, 90, 120)


class Peer(NamedTuple):
    """A kernel of Liger-Kernel and what torch computes for the same inputs; ``launched`` names its kernels."""

    run: Callable[..., Any]
    expected: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    launched: set[str]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


LABELS = torch.tensor([17, 0, 2499])
TRUE = normal(ROWS, COLUMNS).softmax(-1)
NORM = (normal(ROWS, COLUMNS), normal(COLUMNS))
PEERS = {
    "RMS norm": Peer(
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
        lambda x, w: F.rms_norm(x, (COLUMNS,), w, EPS),
        NORM,
        {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel"},
    ),
    "layer norm": Peer(
        lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, (COLUMNS,), w, b, EPS),
        (*NORM, normal(COLUMNS + 1)[1:]),
        {"_layer_norm_forward_kernel", "_layer_norm_backward_kernel"},
    ),
    "SwiGLU": Peer(
        LigerSiLUMulFunction.apply,
        lambda a, b: F.silu(a) * b,
        (normal(ROWS, COLUMNS), normal(ROWS + 1, COLUMNS)[1:]),
        {"_swiglu_forward_kernel", "_swiglu_backward_kernel"},
    ),
    "GEGLU": Peer(
        LigerGELUMulFunction.apply,
        lambda a, b: F.gelu(a, approximate="tanh") * b,
        (normal(ROWS, COLUMNS), normal(ROWS + 1, COLUMNS)[1:]),
        {"_geglu_tanh_forward_kernel", "_geglu_tanh_backward_kernel"},
    ),
    "softmax": Peer(
        LigerSoftmaxFunction.apply,
        lambda x: F.softmax(x, -1),
        (normal(ROWS, COLUMNS),),
        {"_softmax_single_block_forward_kernel", "_softmax_single_block_backward_kernel"},
    ),
    "KL divergence": Peer(
        lambda x: LigerKLDivLossFunction.apply(x, TRUE, "batchmean", False, 1e-10),
        lambda x: F.kl_div(x, TRUE.to(x.dtype), reduction="batchmean"),
        (normal(ROWS, COLUMNS).log_softmax(-1),),
        {"_kldiv_kernel_forward", "_kldiv_kernel_backward"},
    ),
    "cross entropy": Peer(
        lambda x: LigerCrossEntropyFunction.apply(x.clone(), LABELS, None, -100, 0.0, 0.1, "mean", None, False)[0],
        lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
        (normal(ROWS, 2500),),  # of 1,024 threads
        {"liger_cross_entropy_kernel", "element_mul_kernel"},
    ),
    "group norm": Peer(
        lambda x, w, b: LigerGroupNormFunction.apply(x, w, b, 4, 2, EPS),
        lambda x, w, b: F.group_norm(x, 2, w, b, EPS),
        (normal(2, 4, 150), normal(4), normal(5)[1:]),
        {"_group_norm_forward_kernel", "_group_norm_backward_kernel"},
    ),
    "RMS norm in bfloat16": Peer(
        lambda x, w: LigerRMSNormFunction.apply(x, w, EPS, 0.0, "llama", False),
        lambda x, w: F.rms_norm(x, (COLUMNS,), w, EPS),
        (normal(ROWS, COLUMNS, dtype=torch.bfloat16), normal(COLUMNS, dtype=torch.bfloat16)),
        {"_rms_norm_forward_kernel", "_rms_norm_backward_kernel"},
    ),
}


def derivatives(run: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The result and the gradient of every input, for a gradient of the result that is drawn by its shape."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = run(*leaves)
    y.backward(normal(*(y.shape or (1,))).reshape(y.shape).to(y.dtype))
    return [y.detach(), *(x.grad for x in leaves if x.grad is not None)]


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_of_others_have_the_values_of_torch(architecture: int, name: str) -> None:
    peer = PEERS[name]
    with simulated_gpu(architecture, noise=True) as gpu:
        found = derivatives(peer.run, peer.inputs)
    assert {report.kernel for report in gpu.launches} == peer.launched
    expected = derivatives(peer.expected, tuple(x.double() for x in peer.inputs))
    assert len(found) == len(expected) == 1 + len(peer.inputs)
    for value, exact in zip(found, expected, strict=True):
        tolerance = 2e-2 if value.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(value.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_of_a_warp_that_were_rounded_differently_are_a_race(architecture: int) -> None:
    """With one element a thread the first step of a sum of squares is ``x * x + shuffled``, compiled as an fma.

    It rounds one of the two products of a pair of lanes and not the other, so the lanes end with sums that differ in
    the last place, and all of them store theirs at one address of shared memory: the result depends on which is last.
    """
    x, w = normal(ROWS, 100), normal(100)
    with simulated_gpu(architecture), pytest.raises(DataRaceError) as caught:
        PEERS["RMS norm"].run(x, w)
    assert "kernel _rms_norm_forward_kernel" in str(caught.value)
    assert "races with itself: other threads store other values at shared address" in str(caught.value)
    with simulated_gpu(architecture, races=False):
        y = PEERS["RMS norm"].run(x, w)
    torch.testing.assert_close(y, F.rms_norm(x, (100,), w, EPS), rtol=2e-6, atol=2e-6)
