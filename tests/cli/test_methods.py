"""The methods of the recipes against their published formulas, in an implementation that shares nothing with ours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import batches, config, models
from feather_kernels.cli.train.data import Dataset
from feather_kernels.cli.train.methods import METHODS, hold_pruned
from feather_kernels.cli.train.models import make_model
from feather_kernels.cli.train.training import Training
from feather_kernels.sparsify import ConstantSchedule, Sparsifier
from tests.support.teacher import sorted_threshold, train_beside_teacher

IMAGES, CLASSES, BATCH, EPOCHS = 48, 4, 8, 2
STEPS = EPOCHS * IMAGES // BATCH
LR, MOMENTUM, DECAY, CLIP = 0.3, 0.8, 0.05, 0.5


def operator(method: str, w: Tensor, t: float) -> Tensor:
    """P(w) of each method, in float64."""
    kept = w.abs() > t
    if t == 0 or method == "dense":
        return w
    if method == "feather":
        return torch.where(kept, w.sign() * (w.abs() ** 3 - t**3).clamp_min(0) ** (1 / 3), 0)
    if method == "soft":
        return w.sign() * (w.abs() - t).clamp_min(0)
    return torch.where(kept, w, 0)


def scale_of(method: str, sparsity: float) -> float:
    """Factor of the gradient on pruned weights."""
    return {"feather": 1.0 if sparsity <= 0.95 else 0.5, "gmp": 0.0}.get(method, 1.0)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 180 prunable weights."""

    def make(channels: int, classes: int) -> nn.Module:
        convolution = nn.Conv2d(channels, 4, 3, stride=2, padding=1)
        return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(36, classes))

    monkeypatch.setitem(models.MODELS, "tiny", make)


def make_training(method: str, **given: object) -> Training:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(IMAGES) % CLASSES
    images = (labels * 40)[:, None, None, None] + torch.randint(0, 90, (IMAGES, 6, 6, 1), generator=generator)
    dataset = Dataset(images.to(torch.uint8), labels, images[:8].to(torch.uint8), labels[:8])
    options = {"data": "digits", "model": "tiny", "epochs": EPOCHS, "batch_size": BATCH, "device": "cpu", **given}
    settings = {"lr": LR, "momentum": MOMENTUM, "weight_decay": DECAY, "clip": CLIP, "method": method}
    return Training(config.resolve({**options, **settings}), dataset, lambda: None)


class PublishedMethod:
    """The training of one method by its formulas: latent weights in float64, autograd for the plain network only."""

    def __init__(self, training: Training, method: str, sparsity: float) -> None:
        self.method, self.sparsity, self.training = method, sparsity, training
        self.latent = {name: p.detach().double() for name, p in training.model.named_parameters()}
        self.velocity = {name: torch.zeros_like(p) for name, p in self.latent.items()}
        self.step_count = 0

    def prunable(self) -> list[str]:
        return [name for name, value in self.latent.items() if value.dim() > 1]

    def threshold(self) -> float:
        end = STEPS // 2
        remaining = max(0.0, 1 - self.step_count / end)
        sparsity = 0.0 if self.method == "dense" else self.sparsity * (1 - remaining**3)
        return float(sorted_threshold([self.latent[name].float() for name in self.prunable()], sparsity))

    def kept(self) -> dict[str, Tensor]:
        t = self.threshold()
        return {name: (self.latent[name].float().abs() > t) | (t == 0) for name in self.prunable()}

    def step(self, batch: Tensor) -> None:
        t, kept = self.threshold(), self.kept()
        images = self.training.normalise(self.training.images[batch]).double()
        used = {n: operator(self.method, w, t) if n in kept else w for n, w in self.latent.items()}
        used = {name: value.clone().requires_grad_() for name, value in used.items()}
        hidden = F.relu(F.conv2d(images, used["0.weight"], used["0.bias"], stride=2, padding=1)).flatten(1)
        logits = F.linear(hidden, used["3.weight"], used["3.bias"])
        F.cross_entropy(logits, self.training.labels[batch]).backward()
        scale = scale_of(self.method, self.sparsity)
        gradients = {n: torch.where(kept[n], v.grad, scale * v.grad) if n in kept else v.grad for n, v in used.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        lr = 0.5 * LR * (1 + math.cos(math.pi * self.step_count / STEPS))
        for name, w in self.latent.items():
            g = gradients[name] * min(1.0, CLIP / (norm + 1e-6)) + (DECAY * w if w.dim() > 1 else 0)
            self.velocity[name] = MOMENTUM * self.velocity[name] + g
            updated = w - lr * self.velocity[name]
            holds = self.method == "gmp" and name in kept
            self.latent[name] = torch.where(kept[name], updated, w) if holds else updated
        self.step_count += 1


@pytest.mark.parametrize("sparsity", [0.9, 0.97])
@pytest.mark.parametrize("method", METHODS)
def test_a_training_is_that_of_the_published_formulas(tiny: None, method: str, sparsity: float) -> None:
    training = make_training(method, **({} if method == "dense" else {"sparsity": sparsity}))
    published = PublishedMethod(training, method, sparsity)
    start = {name: value.clone() for name, value in published.latent.items()}
    for epoch in range(EPOCHS):
        for batch in batches.epoch_batches(IMAGES, BATCH, seed=0, epoch=epoch):
            training.train_step(batch)
            published.step(batch)
            ours = dict(training.model.named_parameters())
            t = 0.0 if training.sparsifier is None else float(training.sparsifier.threshold)
            for name, kept in published.kept().items():
                assert torch.equal((ours[name].detach().abs() > t) | (t == 0), kept), f"step {training.step}: {name}"
            for name, value in published.latent.items():
                torch.testing.assert_close(ours[name].detach().double(), value, rtol=2e-5, atol=2e-6)
    moved = max(float((value - start[name]).abs().max()) for name, value in published.latent.items())
    assert moved > 0.05, "the training must go somewhere"


def test_methods_differ_from_each_other(tiny: None) -> None:
    weights = []
    for method in METHODS:
        training = make_training(method)
        training.run_epoch()
        weights.append(training.model[3].weight.detach().clone())
    for index, first in enumerate(weights):
        assert not any(torch.allclose(first, other, rtol=1e-4) for other in weights[index + 1 :])


def test_gmp_keeps_the_values_of_pruned_weights_and_lets_them_come_back() -> None:
    layer = nn.Linear(4, 1, bias=False)
    begin = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    with torch.no_grad():
        layer.weight.copy_(begin)
    sparsifier = Sparsifier(layer, schedule=ConstantSchedule(0.5), power=math.inf, grad_scale=0.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1)
    for gradient in (0.0, 0.25):  # the second step takes 0.3 below 0.2
        layer(torch.ones(1, 4)).sum().backward()
        layer.weight.grad.zero_()[0, 2] = gradient
        with hold_pruned(sparsifier):
            optimizer.step()
        sparsifier.step()
        assert torch.equal(layer.weight[0, :2], begin[0, :2])
    assert (layer.sparse_weight() != 0).tolist() == [[False, True, False, True]]


def test_power_and_grad_scale_win_over_those_of_the_method(tiny: None) -> None:
    training = make_training("feather", power=2.0, grad_scale=0.25)
    bindings = [use.binding for weight in training.sparsifier.weights for use in weight.uses]
    assert {binding.power for binding in bindings} == {2.0}
    assert {float(binding.grad_scale) for binding in bindings} == {0.25}


def test_a_dense_training_has_no_sparsifier_and_a_report(tiny: None) -> None:
    training = make_training("dense")
    row = training.run_epoch()
    assert training.sparsifier is None
    assert (row["sparsity_target"], row["sparsity"], row["threshold"]) == (0, 0, 0)
    assert "sparsifier" not in training.state_dict()
    report = training.finalize()
    assert (report.numel, report.zeros) == (180, 0)
    assert type(training.model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "gpm"}, "--method must be one of feather, hard, soft, gmp, dense, got 'gpm'"),
        ({"method": "dense", "sparsity": 0.9}, "--sparsity must be omitted with --method dense"),
        ({"method": "dense", "power": 2.0}, "--power must be omitted with --method dense"),
        ({"method": "dense", "grad_scale": 1.0}, "--grad-scale must be omitted with --method dense"),
        (
            {"method": "hard", "power": 3.0},
            "--power must be omitted with --method hard, whose power is inf (--method f",
        ),
        ({"method": "soft", "power": 3.0}, "--power must be omitted with --method soft, whose power is 1 (--method f"),
        ({"method": "gmp", "power": 1.0}, "--power must be omitted with --method gmp, whose power is inf (--method f"),
        ({"power": 0.5}, "--power must be at least 1"),
        ({"grad_scale": -1.0}, "--grad-scale must be a finite number of at least 0, got -1.0"),
        ({"grad_scale": "half"}, "--grad-scale must be"),
    ],
    ids=str,
)
def test_bad_methods_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(InputError) as caught:
        config.resolve({"data": "digits", **given})
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("method", "power"), [("hard", math.inf), ("soft", 1.0), ("feather", 1.5)])
def test_the_own_power_of_a_method_and_every_power_of_feather_are_taken(method: str, power: float) -> None:
    assert config.resolve({"data": "digits", "method": method, "power": power}).settings.power == power


def test_100_steps_agree_with_the_teacher_on_every_backend(backend: object) -> None:
    """Masks and thresholds exactly, so backends agree with one another too."""
    torch.manual_seed(0)
    labels = torch.arange(64) % 10
    images = torch.randn(10, 1, 8, 8)[labels] + 0.3 * torch.randn(64, 1, 8, 8)
    seen = train_beside_teacher(make_model("cnn", 1, 10, 0), images, labels, steps=100, batch_size=16)
    assert seen.largest_error <= 2
    assert seen.loss < 1.0
