"""What the adapters touch of higher and torchopt is still there, in the shape they rely on.

Neither is maintained. Each touch is named in the docstring of its adapter; a failure here says
which one changed and what relies on it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mamlpp_ext as mpp

higher = pytest.importorskip("higher")
torchopt = pytest.importorskip("torchopt")

from torchopt import base, pytree

from mamlpp_ext.integrations import attributes, twins, unpatched
from mamlpp_ext.integrations import higher as mpp_higher
from mamlpp_ext.integrations import torchopt as mpp_torchopt


def parameters(thing: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(thing).parameters)


Optimizer, Meta = higher.optim.DifferentiableOptimizer, torchopt.MetaOptimizer
# The touch, what it must take (the first arguments in order, or any of the keywords), and who
# relies on it.
SIGNATURES: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "higher.monkeypatch": (
        higher.monkeypatch,
        "module",
        "copy_initial_weights track_higher_grads",
        "integrations.higher.innerloop_ctx",
    ),
    "higher.get_diff_optim": (
        higher.get_diff_optim,
        "opt reference_params",
        "fmodel track_higher_grads",
        "integrations.higher.innerloop_ctx",
    ),
    "higher.register_optim": (
        higher.register_optim,
        "optim_type diff_optim_type",
        "",
        "the end of DifferentiableLSLR",
    ),
    "DifferentiableOptimizer.__init__": (
        Optimizer.__init__,
        "self other reference_params",
        "fmodel track_higher_grads",
        "DifferentiableLSLR.__init__",
    ),
    "DifferentiableOptimizer.step": (
        Optimizer.step,
        "self loss params override grad_callback",
        "",
        "DifferentiableLSLR.step",
    ),
    "DifferentiableOptimizer._update": (
        Optimizer._update,
        "self grouped_grads",
        "",
        "DifferentiableLSLR._update",
    ),
    "DifferentiableOptimizer._apply_override": (
        Optimizer._apply_override,
        "self override",
        "",
        "DifferentiableLSLR._apply_override",
    ),
    "torchopt.MetaOptimizer.__init__": (
        Meta.__init__,
        "self module impl",
        "",
        "MetaLSLR.__init__",
    ),
    "torchopt.MetaOptimizer.step": (Meta.step, "self loss", "", "MetaLSLR.step"),
    "torchopt.extract_state_dict": (
        torchopt.extract_state_dict,
        "target",
        "by with_buffers",
        "integrations.torchopt.innerloop_ctx",
    ),
    "torchopt.recover_state_dict": (
        torchopt.recover_state_dict,
        "target state",
        "",
        "integrations.torchopt.innerloop_ctx",
    ),
    "torchopt.base.GradientTransformation": (
        base.GradientTransformation,
        "init update",
        "",
        "lslr_transform",
    ),
    "torchopt.pytree.tree_flatten": (
        pytree.tree_flatten,
        "tree",
        "none_is_leaf",
        "lslr_transform",
    ),
    "torchopt.pytree.tree_unflatten": (
        pytree.tree_unflatten,
        "treespec leaves",
        "",
        "lslr_transform",
    ),
    "torchopt.pytree.tree_paths": (pytree.tree_paths, "tree", "", "_names_of"),
    "torchopt.pytree.tree_leaves": (pytree.tree_leaves, "tree", "", "_names_of"),
}


@pytest.mark.parametrize("touch", SIGNATURES)
def test_signature(touch: str) -> None:
    thing, first, keywords, relies = SIGNATURES[touch]
    found = parameters(thing)
    assert found[: len(first.split())] == first.split(), (
        f"{touch} takes {found}, {relies} passes {first.split()} by position"
    )
    missing = set(keywords.split()) - set(found)
    assert not missing, f"{touch} has lost {missing}, on which {relies} relies"


# An instance of higher's, made as DifferentiableLSLR is, and what it must hold.
HELD_BY_HIGHER: dict[str, Callable[[Any, nn.Module], bool]] = {
    "param_groups": lambda opt, net: (
        opt.param_groups[0]["params"] == [None, None] and opt.param_groups[0]["lr"] == 0.5
    ),
    "_group_to_param_list": lambda opt, net: opt._group_to_param_list == [[0, 1]],
    "_grad_callback": lambda opt, net: opt._grad_callback is None,
    "_track_higher_grads": lambda opt, net: opt._track_higher_grads is True,
    "_fmodel": lambda opt, net: isinstance(opt._fmodel, nn.Module),
    "_fmodel.fast_params": lambda opt, net: (
        [p.shape for p in opt._fmodel.fast_params] == [p.shape for p in net.parameters()]
    ),
    "_fmodel's _buffers": lambda opt, net: (
        set(opt._fmodel.get_submodule("1")._buffers) == set(net[1]._buffers)
    ),
}


@pytest.mark.parametrize("touch", HELD_BY_HIGHER)
def test_held_by_higher(touch: str) -> None:
    net = nn.Sequential(nn.Linear(2, 1), nn.BatchNorm1d(1, affine=False))
    sgd = torch.optim.SGD(net.parameters(), lr=0.5)
    with higher.innerloop_ctx(net, sgd, copy_initial_weights=False) as (_, diffopt):
        holds = HELD_BY_HIGHER[touch](diffopt, net)
    assert holds, f"higher's {touch} changed, on which DifferentiableLSLR and innerloop_ctx rely"


def test_higher_takes_new_weights_by_update_params() -> None:
    net = nn.Linear(2, 1)
    fnet = higher.monkeypatch(net, copy_initial_weights=False)
    fnet.update_params([torch.ones(1, 2), torch.zeros(1)])
    assert fnet(torch.ones(1, 2)).item() == 2, "update_params, on which DifferentiableLSLR relies"


def test_held_by_torchopt() -> None:
    net = nn.Linear(2, 1)
    impl = mpp_torchopt.lslr_transform(mpp.LSLR(net, 1))
    meta = torchopt.MetaOptimizer(net, impl)
    assert meta.impl is impl, "MetaOptimizer.impl, on which MetaLSLR.step relies"
    (state,) = meta.state_groups
    assert isinstance(state, base.UninitializedState), (
        "MetaOptimizer.state_groups begins otherwise, on which MetaLSLR.step relies"
    )


def test_torchopt_flattens_with_none_as_a_leaf() -> None:
    """Chained transforms hand on None where there is no gradient, and order is that of paths."""
    tree = {"b": 1, "a": (None, 2)}
    leaves, spec = pytree.tree_flatten(tree, none_is_leaf=True)
    assert (leaves, pytree.tree_unflatten(spec, leaves)) == ([None, 2, 1], tree)
    tree = {"b": 1, "a": (3, 2)}
    paths = [".".join(map(str, path)) for path in pytree.tree_paths(tree)]
    assert (paths, pytree.tree_leaves(tree)) == (["a.0", "a.1", "b"], [3, 2, 1])


OURS = {"_names_of", "_places", "_check_names", "_grads", "_replace"} | {
    "_initial",
    "_pairs",
    "_hooks",
    "_count_hooks",
    "_containers",
    "_back",
    "_moved",
    "_twins",
}


@pytest.mark.parametrize(
    "adapter",
    [mpp_higher, twins, attributes, unpatched, mpp_torchopt],
    ids=["higher", "twins", "attributes", "unpatched", "torchopt"],
)
def test_every_touch_is_named_in_the_docstring(adapter: Any) -> None:
    """What the source reads of the peer, and every private attribute, is in the list."""
    tree = ast.parse(Path(adapter.__file__).read_text(encoding="utf-8"))
    peer = adapter.__name__.rpartition(".")[2]
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (
            (isinstance(node.value, ast.Name) and node.value.id in (peer, "pytree"))
            or (node.attr.startswith("_") and not node.attr.startswith("__"))
        )
    }
    imported = {
        name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(peer)
        for name in node.names
    }
    docstring = ast.get_docstring(tree) or ""
    unnamed = {name for name in (used | imported) - OURS if name not in docstring}
    assert not unnamed, f"{adapter.__name__} touches {unnamed}, which its docstring does not name"
