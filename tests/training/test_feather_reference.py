"""Scripts written for the paper's repository run, and compute what a plain implementation computes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk
from feather_kernels.integrations.feather_reference import Pruner, get_params
from tests.support import nets

SCRIPT = """
import torch
from torch.nn import functional as F
from sparse_utils import Pruner, get_params

device, epochs = torch.device("cpu"), 4
loader = [(images[i : i + 16], labels[i : i + 16]) for i in range(0, len(images), 16)]
pruner = Pruner(model, device, final_rate=0.9, nbatches=len(loader), epochs=epochs, pthres=150, t1=1)
params, params_nowd = get_params(model)
optimizer = torch.optim.SGD(
    [{"params": params_nowd, "weight_decay": 0}, {"params": params}], lr=0.05, momentum=0.9, weight_decay=5e-4
)
rates = []
for epoch in range(epochs):
    model.train()
    for data, target in loader:
        pruner.update_thresh()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data.to(device)), target.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 3)
        optimizer.step()
    pruner.update_thresh(end_of_batch=True)
    rates.append(pruner.print_sparsity())
    model.eval()
    logits = model(images)
pruner.desparsify()
torch.save(model.state_dict(), path)
"""


def batches(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(count) % 10
    centres = torch.randn(10, 3, 16, 16, generator=generator)
    return centres[labels] + 0.3 * torch.randn(count, 3, 16, 16, generator=generator), labels


def test_script_runs_with_one_import_changed(tmp_path: Any, capsys: pytest.CaptureFixture) -> None:
    model = nets.conv_net()
    fresh, (images, labels) = copy.deepcopy(model), batches(64)
    names: dict[str, Any] = {"model": model, "images": images, "labels": labels, "path": tmp_path / "model.pt"}
    exec(SCRIPT.replace("from sparse_utils", "from feather_kernels.integrations.feather_reference"), names)

    assert type(model[0]) is nn.Conv2d
    pruned = [model[i].weight for i in (0, 6, 7, 8)]  # 3 has 144 weights, fewer than pthres
    count = sum(weight.numel() for weight in pruned)
    zeros = sum(int((weight == 0).sum()) for weight in pruned)
    assert zeros == math.floor((count - 1) * 0.9) + 1
    assert int((model[3].weight == 0).sum()) == 0
    first, second, *later = names["rates"]
    assert (first, later) == (0, [100 * zeros / count] * 2), "an epoch dense (t1), one of ramp, then the final rate"
    assert 0 < second < 90
    printed = capsys.readouterr().out
    assert "144 elements, fewer than min_numel = 150" in printed
    assert f"{zeros:,} of {count:,} prunable weights are zero" in printed

    fresh.load_state_dict(torch.load(tmp_path / "model.pt"), strict=True)
    assert fresh.eval()(images).equal(names["logits"]), "the model saved is the one evaluated"


def quantile(weights: list[Tensor], sparsity: float) -> Tensor:
    """Linear interpolation between the sorted magnitudes, as in the paper; 0 for sparsity 0."""
    if sparsity == 0:
        return torch.zeros(())
    magnitudes = torch.cat([weight.detach().abs().flatten() for weight in weights]).sort().values
    position = (len(magnitudes) - 1) * sparsity
    low, high = magnitudes[math.floor(position)], magnitudes[math.ceil(position)]
    return low + (high - low) * (position - math.floor(position))


def cubic(step: int, final: float, begin: int, end: int) -> float:
    if step < begin:
        return 0.0
    return final if step >= end else final - final * (1 - (step - begin) / (end - begin)) ** 3


class PlainTraining:
    """Feather as the paper's formulas say it, in float32: a dense network is given P(w), its gradients go to w."""

    def __init__(self, model: nn.Module, final: float, learning_rate: float) -> None:
        self.network = model
        self.weights = nets.prunable(model)
        self.latent = {p: p.detach().clone().requires_grad_() for p in model.parameters()}
        self.optimizer = torch.optim.SGD(self.latent.values(), lr=learning_rate, momentum=0.9)
        self.grad_scale = 0.5 if final > 0.95 else 1.0
        self.threshold = torch.zeros(())
        self.kept: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def set_threshold(self, threshold: Tensor) -> None:
        self.threshold = threshold
        for parameter, latent in self.latent.items():
            parameter.copy_(latent)
        for parameter in self.weights if threshold > 0 else ():
            w = self.latent[parameter]
            cubes = w.abs() ** 3 - threshold**3
            parameter.copy_(torch.where(cubes > 0, w.sign() * cubes.abs() ** (1 / 3), 0))
            self.kept[parameter] = w.abs() > threshold

    def latent_weights(self) -> list[Tensor]:
        return [self.latent[parameter] for parameter in self.weights]

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        self.network.zero_grad()
        loss = F.cross_entropy(self.network(images), labels)
        loss.backward()
        for parameter, latent in self.latent.items():
            kept = self.kept.get(parameter)
            grad = parameter.grad.clone()
            latent.grad = grad if kept is None else torch.where(kept, grad, self.grad_scale * grad)
        return loss.detach()


@pytest.mark.parametrize("final", [0.9, 0.98])
def test_ten_free_steps_as_by_the_formulas(final: float) -> None:
    (images, labels), nbatches, epochs = batches(160), 5, 4
    plain = PlainTraining(nets.conv_net(), final, 0.02)
    model = nets.conv_net()
    pruner = Pruner(model, "cpu", final_rate=final, nbatches=nbatches, epochs=epochs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    losses, differences = [], []
    for step in range(10):
        chosen = torch.arange(step * 16, step * 16 + 16)
        plain.set_threshold(quantile(plain.latent_weights(), cubic(step, final, 0, nbatches * epochs // 2)))
        expected = plain.backward(images[chosen], labels[chosen])
        plain.optimizer.step()

        pruner.update_thresh()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()

        losses.append(loss.item())
        differences.append(abs(loss.item() - expected.item()))
        differences += [
            (p - q).abs().max().item() for p, q in zip(model.parameters(), plain.latent.values(), strict=True)
        ]
    assert max(differences) <= 1e-4
    assert pruner.sparsifier.threshold.item() > 0
    assert losses[-1] != losses[0]


def test_every_step_equals_the_formulas_from_the_same_weights() -> None:
    """Teacher-forced over three epochs, past the end: thresholds, masks and gradients are equal to the bit."""
    final, nbatches, epochs, t1 = 0.98, 8, 3, 1
    images, labels = batches(64)
    model = nets.conv_net()
    pruner = Pruner(model, "cpu", final_rate=final, nbatches=nbatches, epochs=epochs, t1=t1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    dense = nets.conv_net()
    layers = [module for module in model if isinstance(module, fk.nn.SparseLayer)]
    dense_layers = [module for module in dense if isinstance(module, (nn.Conv2d, nn.Linear))]
    for step in range(nbatches * epochs + 5):
        pruner.update_thresh()
        sparsity = cubic(step, final, t1 * nbatches, nbatches * epochs // 2)
        t = quantile(nets.prunable(model), sparsity)
        exact = pruner.sparsifier.threshold
        if not exact.equal(t):  # the interpolation rounded up to the next magnitude: ours stays below
            magnitudes = torch.cat([w.detach().abs().flatten() for w in nets.prunable(model)])
            assert exact < t
            assert int(((magnitudes > exact) & (magnitudes < t)).sum()) == 0

        dense.load_state_dict(copy.deepcopy(model.state_dict()))
        kept = [(layer.weight.detach().abs() > exact) | (exact <= 0) for layer in layers]
        for layer, twin, mask in zip(layers, dense_layers, kept, strict=True):
            value = layer.sparse_weight().detach()
            assert value.ne(0).equal(mask)
            w, cube = layer.weight.detach().double(), exact.double() ** 3
            formula = torch.where(mask, w.sign() * (w.abs() ** 3 - cube).clamp_min(0) ** (1 / 3), 0)
            torch.testing.assert_close(value.double(), formula, rtol=3e-7, atol=0)
            with torch.no_grad():
                twin.weight.copy_(value)
        for network in (model, dense):
            network.zero_grad()
            F.cross_entropy(network(images), labels).backward()
        scaled = {layer.weight: mask for layer, mask in zip(layers, kept, strict=True)}
        for p, q in zip(model.parameters(), dense.parameters(), strict=True):
            expected = torch.where(scaled[p], q.grad, 0.5 * q.grad) if p in scaled else q.grad
            assert p.grad.equal(expected), f"step {step}"
        optimizer.step()


def test_end_of_batch_selects_anew_and_leaves_the_schedule() -> None:
    model = nets.conv_net()
    pruner = Pruner(model, "cpu", final_rate=0.9, nbatches=4, epochs=4)
    pruner.update_thresh(end_of_batch=True)
    assert (pruner.sparsifier.step_count, pruner.sparsifier.sparsity) == (0, 0.0)
    for step in range(20):
        pruner.update_thresh()
        assert pruner.sparsifier.step_count == step
        model(nets.images())
        with torch.no_grad():
            for weight in nets.prunable(model):
                weight.mul_(1.01)
        pruner.update_thresh(end_of_batch=True)
        assert pruner.sparsifier.step_count == step
        expected = fk.functional.magnitude_threshold(nets.prunable(model), cubic(step, 0.9, 0, 8))
        assert pruner.sparsifier.threshold.equal(expected)
    assert pruner.sparsifier.sparsity == 0.9, "four steps past the end"


def test_desparsify_is_exact_without_a_last_update() -> None:
    model = nets.conv_net()
    keys = list(model.state_dict())
    pruner = Pruner(model, "cpu", final_rate=0.9, nbatches=1, epochs=1)
    pruner.update_thresh()
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        model[6].weight.mul_(3)
    pruner.desparsify()
    count = sum(weight.numel() for weight in nets.prunable(model))
    assert sum(int((weight == 0).sum()) for weight in nets.prunable(model)) == math.floor((count - 1) * 0.9) + 1
    assert pruner.print_sparsity() == pytest.approx(90, abs=0.1)
    with pytest.raises(RuntimeError, match=r"after finalize\(\)"):
        pruner.update_thresh()


@pytest.mark.parametrize("updates", [0, 1, 6])
def test_state_resumes(updates: int) -> None:
    model, twin = nets.conv_net(), nets.conv_net()
    arguments: dict[str, Any] = {"device": "cpu", "final_rate": 0.9, "nbatches": 4, "epochs": 4}
    pruner, resumed = Pruner(model, **arguments), Pruner(twin, **arguments)
    for _ in range(updates):
        pruner.update_thresh()
        model(nets.images())
    resumed.load_state_dict(pruner.state_dict())
    twin(nets.images())
    for each in (pruner, resumed):
        each.update_thresh()
    assert resumed.sparsifier.step_count == pruner.sparsifier.step_count == updates
    assert resumed.sparsifier.threshold.equal(pruner.sparsifier.threshold)
    with pytest.raises(ValueError, match=r"a Pruner's .* the key has_begun, got keys \['grad_scales', 'layers'"):
        resumed.load_state_dict(pruner.sparsifier.state_dict())


def test_get_params_leaves_norms_and_biases_without_decay() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.MultiheadAttention(4, 2))
    params, params_nowd = get_params(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in params] == ["0.weight", "2.weight", "3.in_proj_weight", "3.out_proj.weight"]
    assert [names[p] for p in params_nowd] == [
        *("0.bias", "1.weight", "1.bias", "2.bias", "3.in_proj_bias", "3.out_proj.bias"),
    ]
    Pruner(model, "cpu", final_rate=0.5, nbatches=1, epochs=1)
    assert get_params(model) == (params, params_nowd), "before the pruner is made or after it"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"final_rate": 95}, ValueError, r"final_rate must be in \[0, 1\), got 95 \(a fraction"),
        ({"final_rate": 1.0}, ValueError, r"final_rate must be in \[0, 1\), got 1.0"),
        ({"final_rate": "0.9"}, TypeError, "final_rate must be a number, got '0.9'"),
        ({"nbatches": 0}, ValueError, "nbatches must be at least 1, got 0"),
        ({"nbatches": 7.5}, TypeError, "nbatches must be an integer, got 7.5"),
        ({"epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        ({"pthres": -1}, ValueError, "pthres must be at least 0, got -1"),
        ({"pthres": 10**6}, ValueError, "must have a prunable layer, got none; 0: 216 elements, fewer than"),
        ({"t1": -1}, ValueError, "t1 must be at least 0, got -1"),
        ({"t1": 2}, ValueError, r"t1 must be below epochs \(2\), got 2"),
        ({"device": "gpu"}, ValueError, "device must be a torch.device, its name or its index, got 'gpu'"),
        ({"device": None}, ValueError, "device must be .* got None"),
    ],
)
def test_bad_arguments_leave_the_model_dense(change: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nets.conv_net()
    arguments: dict[str, Any] = {"device": "cpu", "final_rate": 0.9, "nbatches": 2, "epochs": 2}
    with pytest.raises(error, match=message):
        Pruner(model, **{**arguments, **change})
    assert type(model[0]) is nn.Conv2d


def test_late_start_goes_to_the_final_rate_at_once() -> None:
    pruner = Pruner(nets.conv_net(), "cpu", final_rate=0.9, nbatches=2, epochs=4, t1=3)
    assert [pruner.sparsifier.schedule.sparsity_at(step) for step in (5, 6, 7, 9)] == [0.0, 0.9, 0.9, 0.9]
