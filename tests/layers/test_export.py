"""Exported models compute what the live model computes, also after saving and loading; else the export raises.

Live models export with the op inside where the format has one. ONNX and torch.jit.script ask for a finalized copy.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feather_kernels as fk
from tests.support import nets

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


class Recurrent(nn.Module):
    """(N, 5, 6) -> (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell = nn.GRU(6, 8, batch_first=True)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.cell(x)[0][:, -1])


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "called and read": (nets.CalledAndRead, nets.images(2, 6)),
    "recurrent": (Recurrent, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))),
}


def through_onnx(model: nn.Module, x: Tensor, *, dynamo: bool) -> Tensor:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra zoo")
    if dynamo:
        pytest.importorskip("onnxscript", reason="needs the extra zoo")
    file = io.BytesIO()
    if dynamo:
        torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    else:
        torch.onnx.export(model, (x,), file, dynamo=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def through_jit(traced: Any, x: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)(x)


def through_export(model: nn.Module, x: Tensor, *, strict: bool) -> Tensor:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (x,), strict=strict), file)
    file.seek(0)
    return torch.export.load(file).module()(x)


def through_inductor(model: nn.Module, x: Tensor) -> Tensor:
    package = torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)))
    return torch._inductor.aoti_load_package(package)(x)


def through_feature_extractor(model: nn.Module, x: Tensor) -> Tensor:
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="needs the extra zoo")
    return extraction.create_feature_extractor(model, ["linear"])(x)["linear"]


Way = Callable[[nn.Module, Tensor], Tensor]
LIVE: dict[str, Way] = {  # formats that have the op, or call the layer
    "jit.trace": lambda model, x: through_jit(torch.jit.trace(model, (x,), check_trace=False), x),
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "feature extractor": through_feature_extractor,
    "export": lambda model, x: through_export(model, x, strict=False),
    "strict export": lambda model, x: through_export(model, x, strict=True),
    "export of the compiled": lambda model, x: through_export(torch.compile(model), x, strict=False),
    "run of the exported": lambda model, x: torch.export.export(model, (x,)).run_decompositions().module()(x),
}
FINAL: dict[str, Way] = {
    "legacy onnx": lambda model, x: through_onnx(model, x, dynamo=False),
    "dynamo onnx": lambda model, x: through_onnx(model, x, dynamo=True),
    "dynamo onnx of the compiled": lambda model, x: through_onnx(torch.compile(model), x, dynamo=True),
    "jit.script": lambda model, x: through_jit(torch.jit.script(model), x),
    "frozen jit.script": lambda model, x: through_jit(torch.jit.freeze(torch.jit.script(model)), x),
}
INDUCTOR = pytest.param("inductor", marks=pytest.mark.slow)


def live(name: str, **options: Any) -> tuple[nn.Module, fk.Sparsifier, Tensor, Tensor]:
    """A sparse model in evaluation, its sparsifier, an input, and what it computes; the truth."""
    torch._dynamo.reset()
    make, x = MODELS[name]
    model = make()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), **options)
    model.eval()
    with torch.no_grad():
        y = model(x)
        assert not y.allclose(make().eval()(x), atol=1e-2), "P(w) and w compute different things"
    return model, sparsifier, x, y


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [*LIVE, INDUCTOR])
def test_live_model_keeps_its_values(way: str, name: str) -> None:
    model, _, x, y = live(name)
    with torch.no_grad():
        torch.testing.assert_close({**LIVE, "inductor": through_inductor}[way](model, x), y)
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("recompute", [None, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("way", [way for way in LIVE if way != "strict export"])
def test_live_model_keeps_its_values_in_grad_mode(way: str, recompute: bool | None) -> None:
    model, _, x, y = live("called and read", recompute=recompute)
    torch.testing.assert_close(LIVE[way](model, x), y)


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", FINAL)
def test_formats_without_the_op_ask_for_a_finalized_copy(way: str, name: str, grad: bool) -> None:
    model, _, x, y = live(name)
    with torch.set_grad_enabled(grad), pytest.raises(Exception, match="finalize a copy of the model first"):
        FINAL[way](model, x)
    assert model(x).allclose(y)


def test_exported_program_that_holds_the_op_is_refused_by_onnx_too() -> None:
    pytest.importorskip("onnxscript", reason="needs the extra zoo")
    model, _, x, _ = live("called and read")
    program = torch.export.export(model, (x,))
    with pytest.raises(Exception, match="finalize a copy of the model first"):
        torch.onnx.export(program, (x,), dynamo=True, verbose=False)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [*LIVE, *FINAL, INDUCTOR])
def test_finalized_copy_exports_with_the_values_of_the_live_model(way: str, name: str) -> None:
    model, sparsifier, x, y = live(name)
    twin, ending = copy.deepcopy((model, sparsifier))
    ending.finalize()
    grad = way == "legacy onnx"  # which lacks the op of attention's fast path
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close({**LIVE, **FINAL, "inductor": through_inductor}[way](twin, x), y)
    assert isinstance(model.linear, fk.nn.SparseLayer)
    assert model(x).allclose(y)


# ------------------------------------------------------------------------------------------------ what a graph holds


@pytest.mark.parametrize("recompute", [None, True], ids=["kept", "recomputed"])
def test_jit_trace_holds_the_op(recompute: bool | None) -> None:
    model, _, x, _ = live("called and read", recompute=recompute)
    traced = torch.jit.trace(model, (x,), check_trace=False)  # dense attention does not pass that check
    assert str(traced.inlined_graph).count("feather_kernels::threshold") >= 4
    with pytest.raises(RuntimeError, match="has no derivative"):  # rather than train without the weights' gradients
        traced(x).sum().backward()


def test_exported_graph_keeps_the_threshold_of_its_moment() -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    x, t = torch.randn(2, 6), sparsifier.threshold.clone()
    program = torch.export.export(model, (x,)).module()  # which shares the Parameters
    with torch.no_grad():
        model[0].weight.mul_(2)
        expected = nn.functional.linear(x, fk.functional.threshold(model[0].weight, t), model[0].bias)
        assert program(x).equal(expected)
        assert not model(x).allclose(expected)


# ------------------------------------------------------------------------------------------------ weights that moved


def moved(name: str) -> tuple[nn.Module, fk.Sparsifier, Tensor]:
    """A model whose weights are others than those that its thresholds were selected from."""
    model, sparsifier, x, _ = live(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, sparsifier, x


def test_trace_of_changed_weights_is_refused() -> None:
    model, sparsifier, x = moved("called and read")
    with pytest.raises(RuntimeError, match=r"call the model once, or Sparsifier\.refresh\(\), before it is traced"):
        torch.jit.trace(model, (x,), check_trace=False)
    sparsifier.refresh()
    torch.testing.assert_close(torch.jit.trace(model, (x,), check_trace=False)(x), model(x))


@pytest.mark.parametrize("strict", [False, True], ids=["", "strict"])
def test_export_of_changed_weights_is_refused(strict: bool) -> None:
    model, sparsifier, x = moved("called and read")
    with pytest.raises(Exception, match=r"Sparsifier\.refresh\(\)"):
        torch.export.export(model, (x,), strict=strict)
    sparsifier.refresh()
    torch.testing.assert_close(torch.export.export(model, (x,), strict=strict).module()(x), model(x))
