"""What per_step_parameters leaves as it was, and who is given a row."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import mamlpp_ext as mpp
from mamlpp_ext.check_setup.model import describe

pytestmark = pytest.mark.usefixtures("float64")

X = torch.linspace(-1, 1, 24, dtype=torch.float64).view(2, 3, 4)


def model() -> nn.Module:
    """Attention that reads its layer's weights, a layer in two places, and a lone parameter."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return nn.Sequential(layer, nn.Linear(4, 4), layer.norm1)


NAMES = ["0.norm?.*", "0.self_attn.out_proj.*", "0.self_attn.in_proj_bias", "1.bias"]


def with_rows(net: nn.Module | None = None, names: Any = NAMES, **settings: Any) -> nn.Module:
    """A model of three rows, no two alike."""
    net = mpp.per_step_parameters(model() if net is None else net, 3, names, **settings)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.add_(torch.linspace(0, 0.5, p.numel(), dtype=p.dtype).view_as(p) if name else 0)
    return net


def by_step(net: nn.Module, x: Tensor = X) -> Tensor:
    return torch.stack([net(x) for _ in mpp.inner_steps(net, 3)])


def plain_at(step: int, net: nn.Module, plain: nn.Module) -> nn.Module:
    """The plain model with the rows of a step as its own parameters."""
    plain = copy.deepcopy(plain)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            table = net.get_parameter(name)
            p.copy_(table if table.shape == p.shape else table[step])
    return plain


def test_every_step_computes_the_original(unchanged: Any) -> None:
    plain = model()
    with unchanged(plain):
        net = mpp.per_step_parameters(plain, 3, NAMES)
        outputs = by_step(net)
        outputs.sum().backward()
        torch.optim.SGD(net.parameters(), lr=1.0).step()
    torch.testing.assert_close(outputs, plain(X).expand(3, 2, 3, 4))
    assert not torch.allclose(by_step(net)[0], plain(X))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_fast_path_of_encoder_layers_reads_rows(training: bool, grad: bool) -> None:
    """In eval mode without gradients torch reads all weights at once, past the modules."""
    plain, net = model().train(training), with_rows().train(training)
    encoder = nn.TransformerEncoder(net[0], 1, enable_nested_tensor=False).train(training)
    mask = torch.tensor([[False, False, True]] * 2)
    with torch.set_grad_enabled(grad):
        for step in mpp.inner_steps(net, 3):
            expected = plain_at(step, net, plain)
            torch.testing.assert_close(net(X), expected(X))
            with mpp.at_step(encoder, step):
                torch.testing.assert_close(encoder(X), expected[0](X))
                found = encoder(X, src_key_padding_mask=mask)
                wanted = expected[0](X, src_key_padding_mask=mask)
                torch.testing.assert_close(found[:, :2], wanted[:, :2])


def test_tables_are_what_is_seen_from_outside() -> None:
    net = with_rows()
    assert net[1].bias.shape == (3, 4)
    assert net[1].bias is dict(net.named_parameters())["1.bias"]
    assert net[0].self_attn.out_proj.weight.shape == (3, 4, 4)
    net(X)
    assert isinstance(net[1].bias, nn.Parameter)
    net[1].bias = nn.Parameter(torch.zeros(3, 4))  # and can be replaced there
    assert not net[1].bias.any()


def test_a_failed_forward_leaves_tables() -> None:
    net = with_rows()
    with pytest.raises(AssertionError, match="embedding dimension"):
        net(X[..., :3])
    assert net[0].norm1.weight.shape == (3, 4)
    assert net[0].self_attn.out_proj.weight.shape == (3, 4, 4)


def test_extra_steps() -> None:
    net = with_rows(extra_steps="last")
    with mpp.at_step(net, 7):
        torch.testing.assert_close(net(X), by_step(net)[2])
    assert "num_steps=3, extra_steps='last', per step: bias" in repr(net)
    assert "in_features=4" in repr(net)


def by_state_dict(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    again = mpp.per_step_parameters(model(), 3, NAMES)
    again.load_state_dict(torch.load(file, weights_only=True))
    return again


def by_file(net: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


ROUND_TRIPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "state_dict": by_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "file": by_file,
}


@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
def test_round_trips(trip: Callable[[nn.Module], nn.Module]) -> None:
    net = with_rows()
    expected = by_step(net)
    again = trip(net)
    torch.testing.assert_close(by_step(again), expected, rtol=0, atol=0)
    assert [type(m) for m in again.modules()] == [type(m) for m in net.modules()]
    assert again[2] is again[0].norm1  # shared as before
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    torch.testing.assert_close(by_step(net), expected, rtol=0, atol=0)


def test_plain_checkpoint_is_spread_over_the_rows() -> None:
    plain, net = model(), with_rows()
    with torch.no_grad():
        plain[0].norm2.bias.fill_(0.25)
    assert list(net.state_dict()) == list(plain.state_dict())
    assert not net.load_state_dict(plain.state_dict()).missing_keys
    torch.testing.assert_close(by_step(net), plain(X).expand(3, 2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_device_and_layout_are_kept(dtype: torch.dtype) -> None:
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.LayerNorm(4, device="meta")).to(dtype)
    plain[0].to(memory_format=torch.channels_last)
    net = mpp.per_step_parameters(plain, 3, ["0.*", "1.weight"])
    for name, p in plain.named_parameters():
        table = net.get_parameter(name)
        assert (table.dtype, table.device) == (p.dtype, p.device)
    assert net[0].weight[1].is_contiguous(memory_format=torch.channels_last)


def test_modes_and_requires_grad_are_kept() -> None:
    plain = model()
    plain[0].norm2.eval()
    plain[1].weight.requires_grad_(False)
    net = mpp.per_step_parameters(plain, 3, NAMES)
    assert [m.training for m in net.modules()] == [m.training for m in plain.modules()]
    for name, p in plain.named_parameters():
        assert net.get_parameter(name).requires_grad == p.requires_grad


def test_hooks_are_kept_and_read_rows() -> None:
    plain, seen = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), []
    plain[1].register_forward_hook(lambda layer, args, output: output + layer.weight)
    plain[1].register_forward_pre_hook(lambda layer, args: seen.append(layer.weight.shape))
    plain[1].register_full_backward_hook(lambda *args: seen.append("backward"))
    net = with_rows(plain, ["1.*"])
    for step in mpp.inner_steps(net, 3):
        torch.testing.assert_close(net(X), plain_at(step, net, plain)(X))
    net(X).sum().backward()
    assert seen == [*[(4,)] * 7, "backward"]


def test_shared_and_tied_parameters_stay_one() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    plain[2].weight = plain[0].weight
    net = with_rows(plain, ["0.weight"])
    assert net[0].weight is net[2].weight
    assert len(list(net.parameters())) == len(list(plain.parameters()))
    for step in mpp.inner_steps(net, 3):
        torch.testing.assert_close(net(X), plain_at(step, net, plain)(X))


def test_rows_can_be_given_in_several_calls() -> None:
    net = mpp.convert_batchnorm(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), 3)
    net = mpp.per_step_parameters(net, 3, ["0.bias"])
    net = mpp.per_step_parameters(net, 3, ["0.weight"])
    assert {name: p.shape[0] for name, p in net.named_parameters()} == dict.fromkeys(
        ("0.weight", "0.bias", "1.weight", "1.bias"), 3
    )
    for step in mpp.inner_steps(net, 3):
        net(X[0])
        assert net[1].num_batches_tracked[step] == 1


def test_lslr_leaves_tables_to_the_outer_loop() -> None:
    net = with_rows()
    names = {name for name, _ in net.named_parameters()}
    chosen = {
        n for n in names if n == "1.bias" or "norm" in n or "out_proj" in n or "in_proj_b" in n
    }
    assert set(mpp.LSLR(net, 3).names) == names - chosen
    assert mpp.LSLR(net, 3, adapt=["1.*"]).names == ("1.weight", "1.bias")


def test_parametrized_layers() -> None:
    plain = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    net = with_rows(plain, ["*original0"])
    for step in mpp.inner_steps(net, 3):
        torch.testing.assert_close(net(X), plain_at(step, net, plain)(X))


def test_compiled() -> None:
    torch.compiler.reset()  # what others compiled counts towards its limit
    net = with_rows()
    whole = not torch.__version__.startswith("2.6.")  # which breaks the graph at each row
    compiled = torch.compile(net, backend="eager", fullgraph=whole)
    torch.testing.assert_close(
        torch.stack([compiled(X) for _ in mpp.inner_steps(net, 3)]), by_step(net)
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of attention, under vmap
def test_ensemble_of_models_by_vmap() -> None:
    # Of a layer in two places torch's functional_call (2.13) would leave the weights it was given.
    nets = [with_rows(model()[:2]), mpp.per_step_parameters(model()[:2], 3, NAMES)]
    params, _ = torch.func.stack_module_state(nets)
    with mpp.at_step(nets[0], 1):
        found = torch.func.vmap(lambda p: torch.func.functional_call(nets[0], p, (X,)))(params)
    torch.testing.assert_close(found, torch.stack([by_step(net)[1] for net in nets]))


def test_layers_run_again_in_a_backward_at_a_known_step() -> None:
    net = with_rows()
    with mpp.at_step(net, 2):
        checkpoint(net, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    found = net[0].norm2.weight.grad
    net.zero_grad()
    by_step(net)[2].sum().backward()
    torch.testing.assert_close(found, net[0].norm2.weight.grad)


def test_each_table_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mamlpp_ext.norm.any_layer.give_rows"):
        mpp.per_step_parameters(model(), 3, ["1.*"])
    assert [record.getMessage() for record in caplog.records] == [
        "1.weight -> (3, 4, 4)",
        "1.bias -> (3, 4)",
    ]


def test_check_setup_knows_of_them() -> None:
    net = with_rows()
    findings = mpp.check_setup(net, mpp.LSLR(net, 3))
    assert not [finding for finding in findings if finding.startswith("problem:")]
    layers = "'0.self_attn', '0.self_attn.out_proj', '0.norm1', '0.norm2', '1'"
    assert f"on: per-step parameters of 5 other layers ({layers})" in findings
    assert "off: per-step batch-norm weights and biases (BNWB) in 0 layers" in findings
    findings = mpp.check_setup(net, mpp.LSLR(net, 2, adapt=["1.*"]))
    assert [finding for finding in findings if "adapts rows of per-step layers" in finding]
    assert [finding for finding in findings if "layer '0.norm1' has num_steps=3" in finding]


def test_the_command_lists_them() -> None:
    lines = [*describe(with_rows(), 3, None, None)]
    assert "per-step: '0.norm1', weight, bias, 3 rows" in lines
    assert "outer loop alone: '0.norm1.weight', (3, 4)" in lines
    assert "adapted: '1.weight', (4, 4)" in lines


def test_a_copy_is_not_called_when_the_original_is() -> None:
    net = with_rows(nn.Sequential(nn.Linear(4, 4)), ["0.*"])
    twin, seen = copy.deepcopy(net), []
    net[0].register_forward_hook(lambda *args: seen.extend((net[0].bias.shape, twin[0].bias.shape)))
    net(X)
    assert seen == [(4,), (3, 4)]


class ScaledAgain(nn.Module):
    """A forward that computes something with its layer's weight once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda t: (t * self.norm.weight).tanh(), x, use_reentrant=False)


def test_what_is_read_again_in_a_backward_is_not_the_table() -> None:
    net = with_rows(ScaledAgain(), ["norm.weight"])
    loss = net(X.clone().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="called within a backward"):
        loss.backward()


class OwnBatchNorm(nn.Module):
    """A layer that calls torch's kernel by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (OwnBatchNorm, (3, 4)),
        (lambda: nn.LayerNorm(4), (2, 3, 4)),
        (lambda: nn.GroupNorm(2, 4), (2, 4, 3)),
        (lambda: nn.InstanceNorm1d(4, affine=True), (2, 4, 3)),
    ],
)
def test_rows_that_are_not_contiguous(norm: Callable[[], nn.Module], shape: Any) -> None:
    """Torch's batch norm (2.13) gives the input of [N, C] wrong gradients by such weights."""
    net, x = with_rows(norm(), "*"), torch.randn(shape, requires_grad=True)
    tables = {name: p.detach() for name, p in net.named_parameters()}
    found = []
    for own in (tables, {name: t.T.contiguous().T for name, t in tables.items()}):
        inputs = [x, *(t.requires_grad_() for t in own.values())]
        with mpp.at_step(net, 1):
            output = torch.func.functional_call(net, own, (x,))
        first = torch.autograd.grad(output.cos().sum(), inputs, create_graph=True)
        total = sum(t.square().sum() for t in first)
        found.append([output, *first, *torch.autograd.grad(total, inputs)])
    torch.testing.assert_close(*found)
