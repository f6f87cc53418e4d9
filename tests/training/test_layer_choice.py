"""Which weights stay dense by default, with reason and size, and how targets takes them in."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk
from feather_kernels.sparsify import LayerChoice, choose_weights

FROZEN = "frozen (requires_grad=False): pruned only if targets names it"


def sparsify(model: nn.Module, **options: Any) -> fk.Sparsifier:
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.8), **options)


def taken(model: nn.Module, **options: Any) -> list[str]:
    return [weight.name for weight in sparsify(copy.deepcopy(model), **options).weights]


def reasons(sparsifier: fk.Sparsifier) -> dict[str, str]:
    return {layer.name: layer.reason for layer in sparsifier.skipped}


# ------------------------------------------------------------------------------------------------ frozen


def half_frozen() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 4))
    model[0].requires_grad_(False)
    return model


def test_a_frozen_layer_keeps_its_weights_bit_for_bit() -> None:
    model = half_frozen()
    before = model[0].weight.clone()
    sparsifier = sparsify(model)
    model(torch.ones(1, 32)).sum().backward()
    sparsifier.step()
    sparsifier.finalize()
    assert model[0].weight.equal(before)
    assert int((model[1].weight == 0).sum()) == int(0.8 * 255) + 1
    assert reasons(sparsifier) == {"0": FROZEN}
    assert sparsifier.report().dense_numel == 32 * 64


@pytest.mark.parametrize("targets", [["0", "1"], [nn.Linear], ["re:.*", "0"], ["1", nn.Linear]], ids=str)
def test_a_frozen_layer_is_taken_where_targets_has_its_name_or_class(targets: list[Any]) -> None:
    assert taken(half_frozen(), targets=targets) == ["0", "1"]


def test_a_pattern_or_a_module_around_it_does_not_take_a_frozen_layer() -> None:
    assert taken(half_frozen(), targets=["re:.*"]) == ["1"]
    assert taken(nn.ModuleDict({"body": half_frozen()}), targets=["body"]) == ["body.1"]


def test_what_the_user_says_comes_before_frozen_as_a_reason() -> None:
    assert reasons(sparsify(half_frozen(), ignore=["0"])) == {"0": "in ignore"}
    assert reasons(sparsify(half_frozen(), targets=["1"])) == {"0": "not in targets"}


def test_only_the_frozen_weights_of_a_layer_are_left() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, kdim=6), "recurrent": nn.GRU(8, 8)})
    attention, recurrent = model["attention"], model["recurrent"]
    attention.k_proj_weight.requires_grad_(False)
    recurrent.weight_hh_l0.requires_grad_(False)
    before = attention.k_proj_weight.clone(), recurrent.weight_hh_l0.clone()
    sparsifier = sparsify(model)
    others = ["attention.q_proj_weight", "attention.v_proj_weight", "attention.out_proj", "recurrent.weight_ih_l0"]
    assert [weight.name for weight in sparsifier.weights] == others
    assert [(layer.name, layer.reason, layer.numel) for layer in sparsifier.skipped] == [
        ("attention.k_proj_weight", FROZEN, 8 * 6),
        ("recurrent.weight_hh_l0", FROZEN, 24 * 8),
    ]
    x = torch.randn(3, 1, 8)
    recurrent(attention(x, x[..., :6], x)[0])[0].sum().backward()
    sparsifier.step()
    sparsifier.finalize()
    assert attention.k_proj_weight.equal(before[0])
    assert recurrent.weight_hh_l0.equal(before[1])
    pruned = [attention.q_proj_weight, attention.v_proj_weight, attention.out_proj.weight, recurrent.weight_ih_l0]
    assert sum(int((weight == 0).sum()) for weight in pruned) == int(0.8 * (6 * 64 - 1)) + 1

    recurrent.requires_grad_(False)
    attention.k_proj_weight.requires_grad_(True)
    assert reasons(sparsify(model)) == {"recurrent": FROZEN}, "one line for a layer of which nothing is taken"


def test_the_frozen_weights_are_returned_so_that_a_change_can_be_noticed() -> None:
    model = half_frozen()
    _, _, frozen = choose_weights(model, LayerChoice())
    assert [use.name for use in frozen] == ["0"]
    assert frozen[0].latent is model[0].weight
    assert choose_weights(model, LayerChoice(ignore=["0"]))[2] == []
    twin, uses = pickle.loads(pickle.dumps((model, frozen)))
    assert uses[0].latent is twin[0].weight


def test_a_frozen_model_has_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match=r"a prunable layer, got none; 0: frozen .*; 1: frozen"):
        sparsify(half_frozen().requires_grad_(False))


# ------------------------------------------------------------------------------------------------ adapters


class TunedLinear(nn.Module):
    """As peft's LoRA layer: the frozen layer, and two low-rank ones by the adapter's name."""

    adapter_layer_names = ("lora_A", "lora_B", "scaled")

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})
        self.scaled = nn.ParameterDict({"default": torch.ones(base.out_features, 1)})

    def forward(self, x: Tensor) -> Tensor:
        low = self.lora_B["default"](self.lora_A["default"](x))
        return (self.base_layer(x) + low) * self.scaled["default"].squeeze(1)


class LowRankLinear(nn.Linear):
    """As loralib's: the factors are Parameters of the layer."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.lora_A = nn.Parameter(torch.randn(2, 8))
        self.lora_B = nn.Parameter(torch.zeros(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


def adapted() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({"q": TunedLinear(nn.Linear(8, 8)), "own": LowRankLinear(), "head": nn.Linear(8, 4)})


def adapter(name: str) -> str:
    return f"{'LoRA ' if name.startswith('lora_') else ''}adapter ({name}): pruned only if targets has its exact name"


def test_adapters_stay_dense() -> None:
    sparsifier = sparsify(adapted())
    assert [weight.name for weight in sparsifier.weights] == ["q.base_layer", "own", "head"]
    assert reasons(sparsifier) == {
        "q.lora_A.default": adapter("lora_A"),
        "q.lora_B.default": adapter("lora_B"),
        "q.scaled": adapter("scaled"),
        "own.lora_A": adapter("lora_A"),
        "own.lora_B": adapter("lora_B"),
    }
    assert sparsifier.report().dense_numel == 4 * 16 + 8


@pytest.mark.parametrize("targets", [[nn.Linear], ["re:.*"], ["q", "own", "head"], ["q.lora_A", "re:[^l]*"]], ids=str)
def test_a_class_a_pattern_or_a_module_around_them_does_not_take_adapters(targets: list[Any]) -> None:
    sparsifier = sparsify(adapted(), targets=targets)
    assert [weight.name for weight in sparsifier.weights][-1] == "head"
    assert not [weight.name for weight in sparsifier.weights if "lora" in weight.name]


def test_an_exact_name_takes_an_adapter() -> None:
    assert taken(adapted(), targets=["q.lora_A.default", "head"]) == ["q.lora_A.default", "head"]


def test_a_frozen_base_and_its_adapters_train_with_a_sparse_head() -> None:
    model = adapted()
    for part in (model["q"].base_layer, model["own"]):
        part.requires_grad_(False)
    sparsifier = sparsify(model)
    assert [weight.name for weight in sparsifier.weights] == ["head"]
    left = reasons(sparsifier)
    assert (left["q.base_layer"], left["own"], left["own.lora_A"]) == (FROZEN, FROZEN, adapter("lora_A"))
    model["head"](model["own"](model["q"](torch.randn(2, 8)))).sum().backward()
    assert model["q"].lora_A["default"].weight.grad is not None
    sparsifier.step()


# ------------------------------------------------------------------------------------------------ standardised


class StdConv2d(nn.Conv2d):
    """Standardises its weight in forward, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


class Derived(StdConv2d):
    pass


def standardised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Derived(3, 4, 3), nn.Conv2d(4, 4, 3))


def test_a_weight_standardised_convolution_stays_dense() -> None:
    sparsifier = sparsify(standardised())
    assert [weight.name for weight in sparsifier.weights] == ["1"]
    reason = "Derived standardises its weight, so that zeros do not stay zero: pruned only if targets names it"
    assert reasons(sparsifier) == {"0": reason}
    assert {layer.note for layer in sparsifier.report().layers} == {""}


@pytest.mark.parametrize("targets", [["0", "1"], [StdConv2d, "1"], ["re:.*", "0"]], ids=str)
def test_a_standardised_convolution_that_is_asked_for_is_taken_with_a_note(targets: list[Any]) -> None:
    model = standardised()
    report = sparsify(model, targets=targets).report()
    note = "standardised after P, so that the convolution does not see these zeros"
    assert [(layer.name, layer.note) for layer in report.layers] == [("0", note), ("1", "")]
    for text in (str(report), report.to_markdown(), report.to_csv(), str(report.to_dict())):
        assert text.count(note) == 1
    model(torch.randn(1, 3, 8, 8)).sum().backward()


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("timm", lambda timm: timm.create_model("resnetv2_50", num_classes=5, conv_layer=timm.layers.StdConv2d)),
        ("timm", lambda timm: timm.create_model("resnetv2_50x1_bit", num_classes=5)),
        ("timm", lambda timm: timm.create_model("dm_nfnet_f0", num_classes=5)),
        ("timm", lambda timm: timm.create_model("nf_regnet_b0", num_classes=5)),
        (
            "transformers",
            lambda hf: hf.BitModel(
                hf.BitConfig(embedding_size=32, hidden_sizes=[128], depths=[1], layer_type="bottleneck")
            ),
        ),
    ],
    ids=["resnetv2_50", "resnetv2_50x1_bit", "dm_nfnet_f0", "nf_regnet_b0", "bit"],
)
def test_standardised_networks_of_others_are_reported(package: str, make: Any) -> None:
    module = pytest.importorskip(package)
    with torch.device("meta"):
        model = make(module)
    weights, skipped, _ = choose_weights(model, LayerChoice(targets=None))
    convolutions = [
        name for name, m in model.named_modules() if re.search("(Std|Standardized)Conv2d", type(m).__name__)
    ]
    assert len(convolutions) > 3
    assert set(convolutions) <= {layer.name for layer in skipped if "standardises its weight" in layer.reason}
    assert not {weight.name for weight in weights} & set(convolutions)


# ------------------------------------------------------------------------------------------------ fused experts


class Experts(nn.Module):
    """Two experts in one Parameter for each projection."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 16, 8))
        self.down = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return sum(F.linear(F.linear(x, self.up[i]).relu(), self.down[i]) for i in range(2))


def mixture() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), Experts(), nn.Linear(8, 4))


def test_the_reason_of_fused_experts_says_how_to_take_them_beside_the_others() -> None:
    model = mixture()
    (left,) = sparsify(copy.deepcopy(model)).skipped
    entry = 'targets=["re:.*", "1"]'
    assert left.reason == f"Experts: pruned only if targets names it; {entry} prunes it and the default layers"
    assert left.numel == 2 * 2 * 16 * 8
    for targets in (["re:.*", "1"], ["re:.*", Experts]):
        assert taken(model, targets=targets) == ["0", "1.up", "1.down", "2"]
    sparsifier = sparsify(model, targets=["re:.*", "1"])
    model(torch.randn(2, 8)).sum().backward()
    assert model[1]._parameters["up"].grad is not None
    sparsifier.step()
    sparsifier.finalize()
    count = sum(p.numel() for p in model.parameters() if p.dim() >= 2)
    assert sum(int((p == 0).sum()) for p in model.parameters() if p.dim() >= 2) == int(0.8 * (count - 1)) + 1


def test_a_token_of_three_dimensions_is_not_taken_for_experts() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.append(nn.ParameterDict({"class_token": torch.zeros(1, 1, 8), "scale": torch.ones(8, 1, 1)}))
    assert reasons(sparsify(model)) == {"1": "ParameterDict: pruned only if targets names it"}


def test_fused_experts_of_transformers_are_taken_as_their_reason_says() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads))
    default = sparsify(copy.deepcopy(model))
    (experts,) = (layer for layer in default.skipped if layer.name.endswith("experts"))
    assert experts.numel == 4 * 3 * 16 * 32
    pattern, name = re.search(r'targets=\["(.*)", "(.*)"\]', experts.reason).groups()
    sparsifier = sparsify(model, targets=[pattern, name])
    weights = [weight.name for weight in default.weights]
    expected = {*weights, f"{name}.gate_up_proj", f"{name}.down_proj"}
    assert {weight.name for weight in sparsifier.weights} == expected
    tokens = torch.randint(50, (2, 12))
    model(input_ids=tokens).logits.square().mean().backward()
    assert all(weight.parameter.grad is not None for weight in sparsifier.weights)
    sparsifier.step()
    model.eval()
    before = model(input_ids=tokens).logits
    zeros = sparsifier.report().zeros
    sparsifier.finalize()
    assert model(input_ids=tokens).logits.equal(before)
    assert zeros == int(0.8 * (sparsifier.report().numel - 1)) + 1 + sparsifier.report().ties


# ------------------------------------------------------------------------------------------------ sizes


def test_every_layer_left_dense_has_its_size_and_shared_weights_count_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Linear(6, 6), "c": nn.Linear(6, 2), "d": nn.Bilinear(2, 3, 4)})
    model["b"].weight = model["a"].weight
    model["normed"] = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4))
    report = sparsify(model, ignore=["a", "b"]).report()
    assert {layer.name: (layer.numel, layer.shared) for layer in report.skipped} == {
        "a": (36, 0),
        "b": (36, 36),
        "d": (24, 0),
        "normed": (4 + 20, 0),
    }
    assert report.dense_numel == 36 + 24 + 24


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"sparse": True}])
def test_a_layer_named_in_targets_that_cannot_be_pruned_is_listed(options: Any) -> None:
    model = nn.Sequential(nn.Embedding(30, 64, **options), nn.Linear(64, 30))
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), targets=["re:.*", "0"])
    (left,) = sparsifier.skipped
    assert (left.name, left.reason) == ("0", "Embedding with sparse gradients or max_norm")


def test_a_layer_named_in_targets_that_has_no_weight_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(ValueError, match="targets names '1', but BatchNorm1d has no weight of two or more dimensions"):
        fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), targets=["re:.*", "1"])
