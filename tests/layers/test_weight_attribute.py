"""The weight as an attribute: reading it gives P(weight) at the usual cost, writing to it raises."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import feather_kernels as fk
from tests.support import nets

LOST = r"Feather\w+\.\w*weight would be lost.*layer\.latent\('\w*weight'\)"


def sparsified(layer: nn.Module, **options: Any) -> nn.Module:
    fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5), **options)
    return layer


def attention() -> nn.Module:
    torch.manual_seed(0)
    return sparsified(nn.MultiheadAttention(8, 2, batch_first=True))


def dense_twin(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """The dense layer with P of the sparse one's weights."""
    dense.load_state_dict(layer.state_dict())
    for module, twin in zip(layer.modules(), dense.modules(), strict=True):
        if isinstance(module, fk.nn.SparseLayer):
            for name in module.feather.thresholds:
                twin._parameters[name].data.copy_(module.sparse_weight(name))
    return dense


# ------------------------------------------------------------------------------------------------ writes

IN_PLACE_METHODS = sorted(n for n in dir(Tensor) if n.endswith("_") and not n.startswith("_") and n[-2] != "_")
WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "weight += 1": lambda m: exec("m.weight += 1", {"m": m}),
    "weight[0] = 0": lambda m: exec("m.weight[0] = 0", {"m": m}),
    "weight.data = x": lambda m: exec("m.weight.data = m.weight.data * 2", {"m": m}),
    "weight.data += x": lambda m: exec("m.weight.data += 1", {"m": m}),
    "weight.data[mask] = 0": lambda m: exec("m.weight.data[m.weight > 0] = 0", {"m": m}),
    "weight.requires_grad = False": lambda m: exec("m.weight.requires_grad = False", {"m": m}),
    "weight.detach().mul_": lambda m: m.weight.detach().mul_(2),
    "row": lambda m: m.weight.data[0].zero_(),
    "flat view": lambda m: m.weight.data.view(-1)[:3].zero_(),
    "transposed": lambda m: m.weight.data.T.zero_(),
    "reshaped": lambda m: m.weight.data.reshape(2, -1).zero_(),
    "each row": lambda m: [row.zero_() for row in m.weight.data],
    "chunks": lambda m: [nn.init.xavier_uniform_(chunk) for chunk in m.weight.chunk(2)],
    "reset_parameters": lambda m: m.reset_parameters(),
    "weight_norm": lambda m: nn.utils.parametrizations.weight_norm(m),
    "orthogonal": lambda m: nn.utils.parametrizations.orthogonal(m),
    "register_hook": lambda m: m.weight.register_hook(print),
    **{
        name: lambda m, name=name: getattr(nn.init, name)(m.weight)
        for name in (
            "uniform_",
            "normal_",
            "zeros_",
            "xavier_normal_",
            "kaiming_uniform_",
            "trunc_normal_",
            "orthogonal_",
        )
    },
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_writes_raise_and_change_nothing(write: str, grad: bool) -> None:
    layer = sparsified(nets.Reader(8, 8))
    before = layer.latent().detach().clone()
    with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=LOST):
        WRITES[write](layer)
    assert layer.latent().equal(before)
    assert isinstance(layer.latent(), nn.Parameter)


def test_every_in_place_method_of_torch_raises() -> None:
    weight = sparsified(nets.Reader(4, 4)).weight
    assert len(IN_PLACE_METHODS) > 150
    for name in IN_PLACE_METHODS:
        for tensor in (weight, weight.data, weight.detach(), weight[0], weight.T):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) on {LOST}"):
                getattr(tensor, name)()


@pytest.mark.filterwarnings("ignore")  # of methods that are deprecated
def test_every_method_that_views_gives_a_guarded_view() -> None:
    """What shares P(weight)'s memory refuses writes, whichever method of torch made it; copies are plain."""
    arguments: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("chunk", "split", "hsplit", "vsplit", "tensor_split"), (2,)),
        **dict.fromkeys(("transpose", "swapaxes", "swapdims", "movedim", "moveaxis"), (0, 1)),
        **dict.fromkeys(("view_as", "expand_as", "reshape_as"), (torch.zeros(4, 4),)),
        **dict.fromkeys(("view", "reshape"), (2, 8)),
        "select": (0, 1),
        "narrow": (0, 0, 2),
        "permute": (1, 0),
        "expand": (4, 4),
        "unsqueeze": (0,),
        "unflatten": (0, (2, 2)),
        "unfold": (0, 2, 1),
        "as_strided": ((2,), (1,)),
        "split_with_sizes": ([1, 3],),
        "__getitem__": (0,),
    }
    weight = sparsified(nets.Reader(4, 4)).weight.detach()
    seen = set()
    for name in sorted({*dir(Tensor)} - {"data", "share_memory_", "storage"}):
        if name.startswith("_") and name != "__getitem__":
            continue
        try:
            attribute = getattr(weight, name)
            result = attribute(*arguments.get(name, ())) if callable(attribute) else attribute
        except Exception:
            continue
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor) and part.layout == torch.strided and part.numel():
                shares = part.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr()
                assert shares == (type(part) is not Tensor), name
                seen.update({name} if shares else ())
    assert len(seen) > 30


class RenormalisedConvolution(nn.Conv2d):
    """The depthwise convolution of EEGNet: keeps the norm of its filters under a limit in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, p=2, dim=0, maxnorm=0.1)
        return super().forward(x)


class MergingLoRA(nn.Linear):
    """The shape of loralib's layer: merges into its weight for evaluation."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.a, self.b, self.merged = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2)), False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * (self.b @ self.a)
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + (0 if self.merged else x @ (self.b @ self.a).T)


def test_layers_that_write_to_their_weight_in_forward_or_train_raise() -> None:
    layer = sparsified(RenormalisedConvolution(3, 4, 3))
    with pytest.raises(RuntimeError, match=LOST):
        layer(torch.randn(1, 3, 5, 5))
    layer = sparsified(MergingLoRA(), targets=["re:"])
    with pytest.raises(RuntimeError, match=LOST):
        layer.eval()


def test_attention_is_not_initialised_anew_by_half() -> None:
    layer = attention()
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(RuntimeError, match=LOST):
        layer._reset_parameters()
    assert all(tensor.equal(before[name]) for name, tensor in layer.state_dict().items())


def test_writes_through_the_parameter_arrive() -> None:
    layer = sparsified(nets.Reader(8, 8))
    nn.init.constant_(layer.latent(), 3.0)
    assert layer.state_dict()["weight"].eq(3).all()
    layer.weight = nn.Parameter(torch.full((8, 8), 2.0))
    assert layer.latent().eq(2).all()
    x = torch.ones(1, 8)
    layer.latent().data[0, :4] = 5.0
    layer.train(False)  # a change of mode finds writes that torch does not count
    layer(x)
    assert int((layer.weight != 0).sum()) == 4
    with pytest.raises(TypeError, match="cannot assign"):  # as in a dense layer
        layer.weight = torch.zeros(8, 8)


# ------------------------------------------------------------------------------------------------ reads


def test_reads_are_plain_to_torch() -> None:
    weight = sparsified(nets.Reader(8, 8)).weight
    assert not torch.overrides.has_torch_function((weight,))
    assert not torch.overrides.has_torch_function((weight.data,))
    results = [weight + 1, weight.clone(), weight @ weight, weight.sum(), F.linear(torch.ones(2, 8), weight)]
    assert {type(result) for result in results} == {Tensor}
    assert not weight._is_view(), "no node of its own in the graph"
    copied = nn.Parameter(weight.clone())
    copied.data.zero_()


def test_gradient_is_that_of_the_parameter() -> None:
    layer = sparsified(nets.Reader(8, 8))
    assert layer.weight.grad is None
    layer(torch.randn(4, 8)).square().sum().backward()
    assert layer.weight.grad is layer.latent().grad
    norm = layer.latent().grad.norm()
    nn.utils.clip_grad_norm_(layer.weight, float(norm) / 2)
    torch.testing.assert_close(layer.latent().grad.norm(), norm / 2)
    layer.weight.grad = None
    assert layer.latent().grad is None
    weight = layer.weight
    weight.retain_grad()
    (2 * weight).sum().backward()
    assert weight.grad.eq(2).all()


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, nets.through_pickle, nets.through_torch_save])
def test_copies_and_pickles_are_plain_tensors(duplicate: Callable[[Any], Tensor]) -> None:
    weight = sparsified(nets.Reader(8, 8)).weight.detach()
    copied = duplicate({"weight": weight})["weight"] if duplicate is not copy.copy else copy.copy(weight)
    assert type(copied) is Tensor
    assert copied.equal(weight)
    with pytest.raises(RuntimeError, match="graph leaves"):  # torch's own words on an intermediate
        copy.deepcopy(sparsified(nets.Reader(8, 8)).weight)
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    assert torch.load(file, weights_only=True).equal(weight)
    assert pickle.loads(pickle.dumps(weight)).equal(weight)


def test_computes_as_dense_attention_does() -> None:
    layer = attention()
    dense = dense_twin(layer, nn.MultiheadAttention(8, 2, batch_first=True))
    x = torch.randn(2, 3, 8)

    def run(module: nn.Module) -> list[Tensor]:
        a = x.clone().requires_grad_()
        y = checkpoint(lambda a: module(a, a, a)[0], a, use_reentrant=False)
        (g,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        g.square().sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            low = module(x, x, x)[0]
        _, tangent = torch.func.jvp(lambda a: module(a, a, a)[0], (x,), (x,))
        with torch.inference_mode():
            inference = module(x, x, x)[0].clone()
        return [y, g, a.grad, module.out_proj.bias.grad, low, tangent, inference]

    for ours, theirs in zip(run(layer), run(dense), strict=True):
        torch.testing.assert_close(ours, theirs)


class Transposed(nn.Linear):
    """Views its weight in forward."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t().reshape(self.in_features, -1) + self.bias


def test_per_sample_gradients_of_torch_func() -> None:
    model, x = nn.Sequential(Transposed(8, 8)), torch.randn(3, 8)
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    model(x).square().sum().backward()
    torch.testing.assert_close(gradients["0.weight"].sum(0), model[0].latent().grad)


def test_fast_path_of_the_encoder_still_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = sparsified(nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))).eval()
    dense = dense_twin(layer, nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))).eval()
    calls = []
    fast = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *a: (calls.append(a), fast(*a))[1])
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        assert layer(x).equal(dense(x))
    assert len(calls) == 2


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_read_in_eager_code_and_used_in_compiled_code(backend: str) -> None:
    torch._dynamo.reset()
    layer, x = sparsified(nets.Reader(8, 8)), torch.randn(2, 8)
    compiled = torch.compile(lambda x, w: x @ w.t() if w.requires_grad else x, backend=backend, fullgraph=True)
    y = compiled(x, layer.weight)
    torch.testing.assert_close(y, x @ layer.weight.t())
    y.sum().backward()
    assert layer.latent().grad is not None
