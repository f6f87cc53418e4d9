"""The package works if torch lacks one of the private names that it uses; each is hidden in turn."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "feather_kernels"
NAMES = {  # in torch_private.py -> where torch has it
    "_are_functorch_transforms_active": "torch._C",
    "_current_graph_task_id": "torch._C",
    "_foreach_norm": "torch",
    "_current_level": "torch.autograd.forward_ad",
    "detect_fake_mode": "torch._guards",
    "is_tracing": "torch.jit",
    "_functorch": "torch._C",
    "is_functorch_wrapped_tensor": "torch._C._functorch",
    "is_batchedtensor": "torch._C._functorch",
    "get_unwrapped": "torch._C._functorch",
    "_get_current_function_mode": "torch.overrides",
    "_disable_dynamo": "torch",
}

TRAINING = """
import copy, importlib
import torch
holder = importlib.import_module({module!r})
hidden = getattr(holder, {name!r})
delattr(holder, {name!r})
import feather_kernels as fk
from feather_kernels.sparsify import Sparsifier
setattr(holder, {name!r}, hidden)  # torch itself needs it

torch.manual_seed(0)
for recompute in (None, True):
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(inplace=True), torch.nn.Flatten(), torch.nn.Linear(128, 6)
    )
    sparsifier = Sparsifier(model, sparsity=0.9, total_steps=6, grad_scale=0.5, recompute=recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(6):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        average.update_parameters(model)
    average(x)
    weights = [average.module[i].latent() for i in (0, 3)]
    assert average.module[0].feather.thresholds["weight"].value.equal(
        fk.functional.magnitude_threshold(weights, 0.9)
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    parameters = {{name: p.detach() for name, p in model.named_parameters()}}
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)
    assert abs(sparsifier.report().sparsity - 0.9) < 1e-3
    sparsifier.finalize()
scaled = Sparsifier(torch.nn.Linear(9, 9), schedule=fk.ConstantSchedule(0.5), score_scale="l2")
assert scaled.report().zeros == 41
w = torch.randn(8, requires_grad=True)
try:
    torch.ops.feather_kernels.threshold(w, torch.tensor(0.5), 3.0).sum().backward()
except RuntimeError as error:
    assert "no derivative" in str(error)
else:
    raise AssertionError("the raw op lost a gradient")
"""


@pytest.mark.parametrize("name", NAMES)
def test_core_works_without(name: str) -> None:
    program = TRAINING.format(module=NAMES[name], name=name)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_above_are_all_that_the_package_uses() -> None:
    used = set(re.findall(r'getattr\([\w.]+, "(\w+)"', (PACKAGE / "torch_private.py").read_text()))
    assert used - {"temporarily_clear_interpreter_stack", "_compiled_call_impl"} == set(NAMES)  # these need no fallback
    for path in PACKAGE.rglob("*.py"):
        if path.name == "torch_private.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute):
                assert not re.match(r"torch\.(\w+\.)*_[a-zA-Z]", ast.unparse(node)), f"{path.name}: {ast.unparse(node)}"
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                assert not re.search(r"\._[a-zA-Z]", node.module or ""), f"{path.name}: {node.module}"
