"""Third-party models with random weights: a train step, the exact sparsity, and why some layers stay dense."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import feather_kernels as fk

SPARSITY = 0.8


@dataclass(frozen=True)
class Case:
    """A model and what is known of it.

    Attributes:
        extra: the package that it needs.
        make: the model, from that package.
        example: its input.
        run: a tensor from model and input.
        weights, count: prunable weights and elements in them, from the architecture.
        dense: patterns of the names of all other parameters of two or more dimensions.
        skipped: the report's reason by the pattern of a layer's name, for all layers that it names as left dense.
        covered: fraction of the elements of all linear, convolution and attention weights; below 1 where an output
            layer is tied to an embedding.
    """

    extra: str
    make: Callable[[Any], nn.Module]
    example: Callable[[], Tensor]
    run: Callable[[nn.Module, Tensor], Tensor]
    weights: int
    count: int
    dense: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    covered: float = 1.0


def image(pixels: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, 3, pixels, pixels)


def tokens() -> Tensor:
    return torch.randint(1, 50, (2, 7))


def vision(
    name: str, weights: int, count: int, *, pixels: int = 32, sizes: dict[str, int] | None = None, **known: Any
) -> Case:
    """A torchvision classifier with 10 classes."""
    return Case(
        "torchvision",
        lambda torchvision: getattr(torchvision.models, name)(weights=None, num_classes=10, **(sizes or {})),
        image(pixels),
        lambda model, x: model(x),
        weights,
        count,
        **known,
    )


def segmentation(name: str, weights: int, count: int) -> Case:
    """A torchvision segmentation net with 3 classes; its backbone is dilated."""
    return Case(
        "torchvision",
        lambda torchvision: getattr(torchvision.models.segmentation, name)(
            weights=None, weights_backbone=None, num_classes=3
        ),
        image(32),
        lambda model, x: model(x)["out"],
        weights,
        count,
    )


def language(model: str, config: str, sizes: dict[str, Any], weights: int, count: int, **known: Any) -> Case:
    """A Hugging Face model with 50 tokens and two layers of width 32."""
    return Case(
        "transformers",
        lambda hf: getattr(hf, model)(getattr(hf, config)(vocab_size=50, **sizes)),
        tokens,
        known.pop("run", lambda model, x: model(input_ids=x).logits),
        weights,
        count,
        **known,
    )


def taken_if_named(kind: str) -> str:
    return f"{kind}: pruned only if targets names it"


BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LLAMA = {**BERT, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}

QUICK = {
    "mobilenet_v3_small": vision("mobilenet_v3_small", 54, 1_512_072),
    "densenet121": vision("densenet121", 121, 6_880_448),
    "swin_t": vision(
        "swin_t",
        53,
        27_439_104,
        pixels=64,
        dense=(r"features\.\d\.\d\.attn\.relative_position_bias_table",),
        skipped={r"features\.\d\.\d\.attn": taken_if_named("ShiftedWindowAttention")},
    ),
    "swin_v2_t": vision(
        "swin_v2_t",
        77,
        27_522_048,
        pixels=64,
        dense=(r"features\.\d\.\d\.attn\.logit_scale",),
        skipped={r"features\.\d\.\d\.attn": taken_if_named("ShiftedWindowAttentionV2")},
    ),
    "deeplabv3_mobilenet_v3_large": segmentation("deeplabv3_mobilenet_v3_large", 70, 10_987_784),
    "bert": language(
        "BertForSequenceClassification",
        "BertConfig",
        BERT,
        2 * 6 + 2,
        2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 32 + 32 * 2,
        dense=(r"bert\.embeddings\.(word|position|token_type)_embeddings\.weight",),
    ),
    "gpt2": language(
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2,
        2 * 4,
        2 * 12 * 32 * 32,
        dense=(r"transformer\.w[tp]e\.weight",),
        skipped={"lm_head": "its weight is tied to 'transformer.wte' (Embedding), which stays dense"},
        covered=24_576 / (24_576 + 50 * 32),
    ),
    "llama": language(
        "LlamaForCausalLM",
        "LlamaConfig",
        LLAMA,
        2 * 7 + 1,
        2 * (3 * 32 * 32 + 3 * 32 * 64) + 32 * 50,
        dense=(r"model\.embed_tokens\.weight",),
    ),
    "t5": language(
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        2 * 6 + 2 * 10,
        2 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * (8 * 32 * 32 + 2 * 32 * 64),
        dense=("shared.weight", r"(en|de)coder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight"),
        skipped={"lm_head": "its weight is tied to 'shared' (Embedding), which stays dense"},
        covered=40_960 / (40_960 + 50 * 32),
        run=lambda model, x: model(input_ids=x, decoder_input_ids=x).logits,
    ),
}
SLOW = {
    "resnet50": vision("resnet50", 54, 25_502_912 - 990 * 2048, pixels=64),
    "resnext50_32x4d": vision("resnext50_32x4d", 54, 22_932_160, pixels=64),
    "convnext_tiny": vision(
        "convnext_tiny",
        59,
        27_763_680,
        dense=(r"features\.\d\.\d\.layer_scale",),
        skipped={r"features\.\d\.\d": taken_if_named("CNBlock")},
    ),
    "vit_b_16": vision(
        "vit_b_16",
        50,
        85_532_160,
        sizes={"image_size": 32},
        dense=("class_token", r"encoder\.pos_embedding"),
        skipped={r"\(root\)": taken_if_named("VisionTransformer"), "encoder": taken_if_named("Encoder")},
    ),
    "fcn_resnet50": segmentation("fcn_resnet50", 55, 32_893_632),
}


def randomise(model: nn.Module) -> None:
    """Weights of one scale, so that a global threshold empties no layer, and nothing that is zero at the start.

    Batch norms take the statistics of the last batch, so that the output in evaluation is not degenerate.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.05)
            else:
                parameter.add_(0.05 * torch.randn_like(parameter))
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = 1.0


def connections(model: nn.Module) -> list[nn.Parameter]:
    """Weights of all linear, convolution and attention layers, each once, found by another rule than the package's."""
    kinds = r"(NonDynamicallyQuantizable)?Linear|Conv[123]d|ConvTranspose[123]d|Conv1D|MultiheadAttention"
    named = [(type(module).__name__, module) for module in model.modules()]
    found = [p for kind, m in named if re.fullmatch(kinds, kind) for p in m._parameters.values() if p is not None]
    return list(dict.fromkeys(p for p in found if p.dim() >= 2))


def check_what_is_covered(
    model: nn.Module, connected: list[nn.Parameter], sparsifier: fk.Sparsifier, case: Case
) -> None:
    """Each parameter of two or more dimensions is pruned or one of ``case.dense``; each reason is one of the case's."""
    pruned = {weight.parameter for weight in sparsifier.weights}
    assert len(pruned) == case.weights
    assert sum(p.numel() for p in pruned) == case.count
    assert sum(p.numel() for p in pruned) / sum(p.numel() for p in connected) == case.covered

    left = [name for name, p in model.named_parameters() if p.dim() >= 2 and p not in pruned]
    assert [name for name in left if not any(re.fullmatch(pattern, name) for pattern in case.dense)] == []
    assert all(any(re.fullmatch(pattern, name) for name in left) for pattern in case.dense)

    reasons = {layer.name: layer.reason for layer in sparsifier.report().skipped}
    for name, reason in reasons.items():
        assert [r for pattern, r in case.skipped.items() if re.fullmatch(pattern, name)] == [reason], name
    assert all(any(re.fullmatch(pattern, name) for name in reasons) for pattern in case.skipped)


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_train_step_finalize_and_reload(name: str) -> None:
    case = {**QUICK, **SLOW}[name]
    package = pytest.importorskip(case.extra, reason=f"needs the extra zoo ({case.extra})")
    torch.manual_seed(0)
    model = case.make(package)
    randomise(model)
    fresh, connected, x = copy.deepcopy(model).eval(), connections(model), case.example()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(SPARSITY))
    check_what_is_covered(model, connected, sparsifier, case)

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    case.run(model, x).square().mean().backward()
    assert [w.name for w in sparsifier.weights if w.parameter.grad is None] == []
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # batch norms over two samples can make gradients of any size
    optimizer.step()
    sparsifier.step()  # raises if the forward of a sparse layer has not run

    model.eval()
    with torch.no_grad():
        output = case.run(model, x)
        latent = case.run(_with_weights_of(fresh, model), x)
    report = sparsifier.report()
    weights = [weight.parameter for weight in sparsifier.weights]
    sparsifier.finalize()
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros == report.zeros == math.floor((case.count - 1) * SPARSITY) + 1 + report.ties

    assert output.isfinite().all()
    assert output.std() > 0, "a degenerate output would be equal to anything"
    assert not output.allclose(latent), "the sparse model computes with P(w), not with w"
    with torch.no_grad():
        assert case.run(model, x).equal(output)
        assert case.run(_with_weights_of(fresh, model), x).equal(output)


def _with_weights_of(fresh: nn.Module, model: nn.Module) -> nn.Module:
    """The dense model with the other's state_dict, strictly."""
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_attention_that_reads_its_projection_needs_no_option(name: str) -> None:
    timm = pytest.importorskip("timm")
    sizes = {"depth": 1} if "swin" not in name else {"depths": (1, 1, 1, 1)}
    model = timm.create_model(name, num_classes=10, **sizes)
    side = int(name.rsplit("_", 1)[1])
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(SPARSITY))
    model(torch.randn(1, 3, side, side)).sum().backward()
    sparsifier.step()
    assert {use.form for weight in sparsifier.weights for use in weight.uses if "qkv" in use.name} == {"attribute"}
