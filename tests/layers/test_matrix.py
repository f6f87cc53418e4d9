"""Every layer family with every user habit: sparse layers work wherever dense ones do."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import feather_kernels as fk
from feather_kernels.nn import SparseLayer
from tests.support.families import FAMILIES, Family
from tests.support.nets import through_pickle, through_torch_save

SPARSITY = 0.6


IN_BOTH_MODES = {
    **FAMILIES,
    **{
        f"{name}, recomputed": replace(family, options={**family.options, "recompute": True})
        for name, family in FAMILIES.items()
        if family.recomputes
    },
}


@pytest.fixture(params=IN_BOTH_MODES)
def family(request: pytest.FixtureRequest) -> Family:
    """A family of layers, and again with P(weight) computed twice where it can be."""
    return IN_BOTH_MODES[request.param]


def sparsify(model: nn.Module, family: Family, **options: Any) -> fk.Sparsifier:
    """At a constant sparsity, with gradients of pruned weights halved."""
    options = {"schedule": fk.ConstantSchedule(SPARSITY), "grad_scale": 0.5, **family.options, **options}
    return fk.Sparsifier(model, **options)


def finalized(family: Family) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The dense model with P(w) in its weights, and by parameter name the mask of what is kept."""
    model, latent = family.model(), family.model()
    sparsify(model, family).finalize()
    before = dict(latent.named_parameters())
    masks = {
        name: torch.ones_like(p, dtype=torch.bool) if p.equal(before[name]) else p.detach() != 0
        for name, p in model.named_parameters()
    }
    return model, masks


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_values_and_gradients_are_those_of_the_dense_layer_on_sparse_weights(family: Family, mode: str) -> None:
    dense, masks = finalized(family)
    assert any(not mask.all() for mask in masks.values())
    model = family.model()
    sparsifier = sparsify(model, family)
    model.train(mode == "train"), dense.train(mode == "train")
    x, x_dense = family.input().requires_grad_(), family.input().requires_grad_()
    y, y_dense = model(x), dense(x_dense)
    torch.testing.assert_close(y, y_dense, rtol=1e-6, atol=1e-6)
    y.square().sum().backward()
    y_dense.square().sum().backward()
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-5, atol=1e-5)
    for name, grad in gradients(dense).items():
        expected = torch.where(masks[name], grad, grad * 0.5)
        torch.testing.assert_close(gradients(model)[name], expected, rtol=1e-5, atol=1e-5)
    backward = {layer.backward for layer in sparsifier.report().layers}
    assert ("recomputes" in backward) == ("recompute" in family.options)


def test_no_grad_eval_sees_the_sparse_weights(family: Family) -> None:
    """The fast paths of eval mode too."""
    dense, _ = finalized(family)
    model = family.model()
    sparsify(model, family)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(family.input()), dense.eval()(family.input()), rtol=1e-5, atol=1e-5)


def test_finalize_and_detach(family: Family) -> None:
    model, untouched = family.model(), family.model()
    sparsifier = sparsify(model, family)
    parameters = dict(model.named_parameters())
    assert list(model.state_dict()) == list(untouched.state_dict())
    sparsifier.detach()
    assert [type(m) for m in model.modules()] == [type(m) for m in untouched.modules()]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model(family.input()).equal(untouched(family.input()))
    sparsifier = sparsify(model, family)
    y = model.eval()(family.input())
    report = sparsifier.report()
    sparsifier.finalize()
    torch.testing.assert_close(model(family.input()), y, rtol=1e-5, atol=1e-5)
    assert report.zeros == int((report.numel - 1) * SPARSITY) + 1 + report.ties
    untouched.load_state_dict(model.state_dict(), strict=True)
    assert untouched.eval()(family.input()).equal(model(family.input()))


def test_compile(family: Family) -> None:
    torch._dynamo.reset()
    if not family.compiles:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(family.model(), backend="aot_eager", fullgraph=True)(family.input())
        pytest.skip("torch.compile does not trace recurrent layers in one graph, dense ones neither")
    model = family.model()
    schedule = fk.CubicSchedule(SPARSITY, 0, 80)
    sparsifier = sparsify(model, family, schedule=schedule)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(100):
        y = compiled(family.input())
        if step % 25 == 0:
            twin.load_state_dict(model.state_dict())  # its next forward selects thresholds from them
            torch.testing.assert_close(y, twin(family.input()), rtol=1e-5, atol=1e-5)
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(family: Family, dtype: torch.dtype) -> None:
    dense, masks = finalized(family)
    model = family.model()
    sparsify(model, family)
    x, x_dense = family.input().requires_grad_(), family.input().requires_grad_()
    try:
        with torch.autocast("cpu", dtype=dtype):
            y_dense = dense(x_dense)
        y_dense.float().sum().backward()
    except RuntimeError as error:
        pytest.skip(f"the dense layer does not run: {error}")
    with torch.autocast("cpu", dtype=dtype):
        y = model(x)
    assert y.dtype == y_dense.dtype
    torch.testing.assert_close(y, y_dense)
    y.float().sum().backward()
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(x.grad, x_dense.grad, **tolerance)
    for name, grad in gradients(dense).items():
        assert gradients(model)[name].dtype == torch.float32
        expected = torch.where(masks[name], grad, grad * 0.5)
        torch.testing.assert_close(gradients(model)[name], expected, **tolerance)


def test_pure_bfloat16(family: Family) -> None:
    model = family.model().bfloat16()
    sparsifier = sparsify(model, family)
    y = model(family.input().bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(model).values())
    sparsifier.step()
    report = sparsifier.report()
    assert report.zeros == int((report.numel - 1) * SPARSITY) + 1 + report.ties


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_torch_save])
def test_copies(family: Family, duplicate: Any) -> None:
    model = family.model()
    sparsifier = sparsify(model, family)
    twin = duplicate(model)
    assert twin(family.input()).equal(model(family.input()))
    twin(family.input()).sum().backward()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3)
    twin(family.input())
    tripled = next(m for m in twin.modules() if isinstance(m, SparseLayer)).feather.thresholds.values()
    torch.testing.assert_close(next(iter(tripled)).value, 3 * sparsifier.threshold)


def test_resume(family: Family) -> None:
    """Model, sparsifier and optimizer continue from their states bit for bit."""

    def start() -> tuple[nn.Module, fk.Sparsifier, torch.optim.Optimizer]:
        model = family.model()
        sparsifier = sparsify(model, family, schedule=fk.CubicSchedule(SPARSITY, 0, 8))
        return model, sparsifier, torch.optim.AdamW(model.parameters(), lr=0.01)

    def train(model: nn.Module, sparsifier: fk.Sparsifier, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            model(family.input()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            sparsifier.step()

    parts, resumed = start(), start()
    train(*parts, 5)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in parts], file)
    train(*parts, 5)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*resumed, 5)
    assert all(a.equal(b) for a, b in zip(parts[0].parameters(), resumed[0].parameters(), strict=True))
    assert parts[1].threshold.equal(resumed[1].threshold)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(family: Family, reentrant: bool) -> None:
    model = family.model()
    sparsify(model, family)
    x = family.input().requires_grad_()
    model(x).square().sum().backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, expected[name])


@pytest.mark.parametrize("state", ["live", "finalized"])
def test_export(family: Family, state: str) -> None:
    model = family.model().eval()
    sparsifier = sparsify(model, family)
    if state == "finalized":
        sparsifier.finalize()
    y = model(family.input())
    exported = torch.export.export(model, (family.input(),))
    torch.testing.assert_close(exported.module()(family.input()), y, rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(family.input()), y, rtol=1e-5, atol=1e-5)
    used = {str(node.target) for node in exported.graph.nodes}
    assert ("feather_kernels.threshold.default" in used) == (state == "live")


def test_functional_call_grad_and_vmap(family: Family) -> None:
    model = family.model()
    sparsify(model, family)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    x = family.input()
    model(x).square().sum().backward()
    by_func = torch.func.grad(loss)(parameters, x)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(by_func[name], grad, rtol=1e-5, atol=1e-5)
    batches = torch.stack([x, 2 * x])
    try:
        torch.func.vmap(family.model())(batches)
    except RuntimeError as error:
        pytest.skip(f"the gradients were compared, but the dense layer does not run under vmap: {error}")
    each = torch.func.vmap(loss, in_dims=(None, 0))(parameters, batches)
    torch.testing.assert_close(each, torch.stack([loss(parameters, x), loss(parameters, 2 * x)]), rtol=1e-4, atol=1e-4)


def test_gradient_accumulation_and_hooks(family: Family) -> None:
    model = family.model()
    sparsifier = sparsify(model, family)
    fired: list[str] = []
    model.register_forward_hook(lambda *_: fired.append("forward"))
    model.register_full_backward_hook(lambda *_: fired.append("backward"))
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: fired.append("accumulated"))
    x = family.input().requires_grad_()
    for _ in range(2):
        model(x).square().sum().backward()
    twice = gradients(model)
    assert fired.count("forward") == fired.count("backward") == 2
    assert fired.count("accumulated") == 2 * len(twice)
    model.zero_grad()
    model(x).square().sum().backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(twice[name], 2 * grad)
    sparsifier.step()


def test_double_backward(family: Family) -> None:
    """A gradient penalty equals that of the dense layer whose weights P(w) depend on w by the mask."""
    dense, masks = finalized(family)
    model = family.model()
    sparsify(model, family)

    def penalty(model: nn.Module) -> None:
        x = family.input().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()

    try:
        penalty(dense)
    except RuntimeError as error:
        pytest.skip(f"the dense layer has no double backward: {error}")
    penalty(model)
    for name, grad in gradients(dense).items():
        expected = torch.where(masks[name], grad, grad * 0.5)
        torch.testing.assert_close(gradients(model)[name], expected, rtol=1e-4, atol=1e-4)


def test_forward_mode(family: Family) -> None:
    """The tangent is that of the dense layer on P(w), whose tangent is that of w by the mask."""
    dense, masks = finalized(family)
    model = family.model()
    sparsify(model, family)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}
    masked = {name: torch.where(masks[name], tangent, 0.5 * tangent) for name, tangent in tangents.items()}
    values = {name: p.detach().clone() for name, p in dense.named_parameters()}
    x, dx = family.input(), torch.randn_like(family.input())

    def tangent_of(layer: nn.Module, weights: dict[str, Any], directions: dict[str, Any]) -> torch.Tensor:
        with forward_ad.dual_level():
            duals = {name: forward_ad.make_dual(w, directions[name]) for name, w in weights.items()}
            y = torch.func.functional_call(layer, duals, (forward_ad.make_dual(x, dx),))
            return forward_ad.unpack_dual(y).tangent

    try:
        expected = tangent_of(dense, values, masked)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"the dense layer has no forward mode: {error}")
    torch.testing.assert_close(tangent_of(model, parameters, tangents), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_thresholds_survive_moves(family: Family) -> None:
    model = family.model()
    sparsifier = sparsify(model, family)
    before = sparsifier.threshold.clone()
    model.half().float().to(memory_format=torch.preserve_format)
    assert sparsifier.threshold.equal(before)
    model.double()
    assert model(family.input().double()).dtype == torch.float64


def test_parametrize(family: Family) -> None:
    """Before: the layer stays dense, with the reason. After: the sparsifier names what was lost."""

    class Double(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    model = family.model()
    sparsifier = sparsify(model, family)
    layer = next(m for m in model.modules() if isinstance(m, SparseLayer))
    name = next(iter(layer.feather.thresholds))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(layer._parameters, name, None)
        with pytest.raises(RuntimeError, match="has lost its Parameter"):
            sparsifier.refresh(model)

    dense = family.model()
    path = next(n for n, m in model.named_modules() if m is layer)
    target = dense.get_submodule(path)
    try:
        torch.nn.utils.parametrize.register_parametrization(target, name, Double())
    except Exception as error:
        pytest.skip(f"torch does not parametrize the dense layer: {error}")
    rest = nn.Linear(8, 8)
    options = {"targets": [*family.options["targets"], nn.Linear]} if "targets" in family.options else {}
    skipped = sparsify(nn.ModuleList([dense, rest]), family, **options, read_directly=None).skipped
    assert any("has a parametrization" in layer.reason for layer in skipped)
