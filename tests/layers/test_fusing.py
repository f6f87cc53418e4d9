"""Editing the weights of live layers gives right values, or an error that says to finalize a copy first."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval

import feather_kernels as fk
from tests.support import nets

REPLACED = r"weight of this copy of a sparse \w+ was replaced .*: finalize a copy of the model first"


Fuser = Callable[[Any, Any], nn.Module]
PAIRS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Fuser]] = {
    "Conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (4, 3, 9), fuse_conv_bn_eval),
    "Conv2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), (4, 3, 9, 9), fuse_conv_bn_eval),
    "ConvTranspose2d": (
        lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)),
        (4, 3, 5, 5),
        lambda layer, norm: fuse_conv_bn_eval(layer, norm, transpose=True),
    ),
    "Linear": (lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), (4, 6), fuse_linear_bn_eval),
    "reader": (lambda: nn.Sequential(nets.Reader(6, 8), nn.BatchNorm1d(8)), (4, 6), fuse_linear_bn_eval),
}


def live(case: str) -> tuple[nn.Module, fk.Sparsifier, Tensor, Fuser]:
    """A layer and its batch norm with statistics, sparse, in evaluation."""
    torch.manual_seed(0)
    make, shape, fuser = PAIRS[case]
    model = make()
    for _ in range(20):
        model(3 * torch.randn(shape))
    return model.eval(), fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5)), torch.randn(shape), fuser


@pytest.mark.filterwarnings("ignore:the thresholds of this copy")  # where a fuser reads P(weight) of its copy
@pytest.mark.parametrize("case", PAIRS)
def test_fused_with_its_batch_norm_raises_and_after_finalize_fuses(case: str) -> None:
    model, sparsifier, x, fuser = live(case)
    y = model(x)
    fused = fuser(model[0], model[1])
    for module in (fused, copy.deepcopy(fused), nets.through_pickle(fused), nn.Sequential(fused).double().float()):
        with pytest.raises(RuntimeError, match=REPLACED):
            module(x)
    assert model(x).equal(y)
    twin, ending = copy.deepcopy((model, sparsifier))
    ending.finalize()
    torch.testing.assert_close(fuser(twin[0], twin[1])(x), y)


def test_fused_layers_are_not_compiled_or_exported_with_the_copied_threshold() -> None:
    torch._dynamo.reset()
    model, _, x, fuser = live("Conv2d")
    fused = fuser(model[0], model[1])
    with pytest.raises(RuntimeError, match=REPLACED):
        torch.compile(fused, backend="eager")(x)
    for strict in (False, True):
        with pytest.raises(Exception, match=REPLACED):
            torch.export.export(fused, (x,), strict=strict)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("inplace", [False, True])
def test_fuser_of_torch_ao_names_the_class_that_it_does_not_know(inplace: bool) -> None:
    from torch.ao.quantization import fuse_modules

    model, sparsifier, x, _ = live("Conv2d")
    y = model(x)
    with pytest.raises((AssertionError, NotImplementedError), match="FeatherConv2d"):
        fuse_modules(model, [["0", "1"]], inplace=inplace)
    assert model(x).equal(y)
    sparsifier.finalize()
    torch.testing.assert_close(fuse_modules(model, [["0", "1"]], inplace=inplace)(x), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fusers_that_ask_for_the_exact_type_leave_live_layers_as_they_are() -> None:
    from torch.ao.quantization.quantize_fx import fuse_fx

    model, sparsifier, x, _ = live("Conv2d")
    y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fk.SparsityWarning)  # the fused modules are copies without the model's hook
        for fused in (fuse(model), fuse_fx(copy.deepcopy(model))):
            assert isinstance(fused.get_submodule("0"), fk.nn.SparseLayer)
            assert fused(x).equal(y)
    sparsifier.finalize()
    assert [type(module) for module in fuse(model).children()] == [nn.Conv2d]
    torch.testing.assert_close(fuse(model)(x), y)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_quantization_passes_over_live_layers_and_takes_finalized_ones() -> None:
    """It asks for the exact type, as the FLOP counters thop and ptflops do."""
    from torch.ao.quantization import quantize_dynamic

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(3, 8)
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    y = model(x)
    passed_over = quantize_dynamic(model, {nn.Linear})
    assert [type(module) for module in passed_over] == [type(module) for module in model]
    assert passed_over(x).equal(y)
    sparsifier.finalize()
    quantized = quantize_dynamic(model, {nn.Linear})
    assert all("quantized" in type(quantized[i]).__module__ for i in (0, 2))
    torch.testing.assert_close(quantized(x), y, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_timms_reparameterisation_after_finalize(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra zoo")
    model, sparsifier, x = timm_model(timm, name)
    y = model(x)
    sparsifier.finalize()
    deployed = timm.utils.reparameterize_model(model)
    assert sum(p.numel() for p in deployed.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(deployed(x), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["repvgg_a0", "mobileone_s0", "fastvit_t8"])
def test_timms_reparameterisation_of_a_live_model_raises(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs the extra zoo")
    model, _, x = timm_model(timm, name)
    deployed = timm.utils.reparameterize_model(model)
    with pytest.raises(RuntimeError, match=r"to fuse or reparameterise it, finalize\(\) a copy first"):
        deployed(x)


def timm_model(timm: Any, name: str) -> tuple[nn.Module, fk.Sparsifier, Tensor]:
    """In evaluation, with batch norm statistics of its activations, which are neither zero nor huge."""
    torch.manual_seed(0)
    model, x = timm.create_model(name, num_classes=10), torch.randn(4, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        for _ in range(2):
            model(x)
    sparsifier = fk.Sparsifier(model.eval(), schedule=fk.ConstantSchedule(0.3), scope="layer")
    assert model(x).std() > 0.01
    return model, sparsifier, x[:1]


# ------------------------------------------------------------------------------------------------ copies of layers


def test_updates_of_a_copied_layer_in_place_warn_once_and_name_the_line_of_the_caller() -> None:
    model, _, x, _ = live("Conv2d")
    target = copy.deepcopy(model[0])
    with torch.no_grad():
        for mine, theirs in zip(target.parameters(), model[0].parameters(), strict=True):
            mine.lerp_(theirs, 0.1)
    with pytest.warns(
        fk.SparsityWarning, match="this copy of sparse layers are still those that were copied"
    ) as caught:
        nn.Sequential(target)(x)
    assert [record.filename for record in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target(x)


def test_weights_loaded_into_a_copied_layer_by_assignment_warn_too() -> None:
    model, _, x, _ = live("Conv2d")
    target = copy.deepcopy(model[0])
    target.load_state_dict({name: tensor.clone() for name, tensor in model[0].state_dict().items()}, assign=True)
    with pytest.warns(fk.SparsityWarning):
        assert target(x).equal(model[0](x))


def test_a_new_parameter_in_the_model_or_in_its_whole_copy_is_followed() -> None:
    model, _, x, _ = live("Conv2d")
    for owner in (model, copy.deepcopy(model)):
        owner[0].weight = nn.Parameter(torch.randn(8, 3, 3, 3))
        owner(x)
        assert int((owner[0].sparse_weight() == 0).sum()) == (8 * 27 - 1) // 2 + 1
        part = copy.deepcopy(owner[0])  # a snapshot of what has been followed
        with pytest.warns(fk.SparsityWarning):
            assert part(x).equal(owner[0](x))
