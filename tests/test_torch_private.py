"""Without any one of torch's private parts results stay right, or what cannot be had says so.

A part is taken away from this package alone: torch itself goes on using it, as a torch that has
moved it would.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import mamlpp_ext
from mamlpp_ext import torch_private
from mamlpp_ext.torch_private import modules, operators, transforms, trees, watchers, weight_norm

pytest.importorskip("higher")
pytest.importorskip("torchopt")

from every_loop import Results, results

FILES = (modules, operators, transforms, trees, watchers, weight_norm)
PACKAGE = Path(mamlpp_ext.__file__).parent
TESTS = Path(__file__).parent

# The part, and which of the results cannot be had without it.
PARTS = {
    "torch._C._are_functorch_transforms_active": "",
    "torch._C._current_graph_task_id": "",
    "torch._C._len_torch_dispatch_stack": "",
    "torch._C._len_torch_function_stack": "",
    "torch._C._cuda_clearCublasWorkspaces": "",
    "torch._C.DisableTorchFunction": "",
    "torch._foreach_addcmul": "",
    "torch._weight_norm": "",
    "forward_ad._current_level": "",
    "forward_ad._set_fwd_grad_enabled": "forward mode",
    "_functorch": "",
    "_functorch._add_batch_dim": "",
    "_functorch._unwrap_batched": "",
    "_functorch.is_legacy_batchedtensor": "",
    "_functions": "",
    "_functions.VmapInfo": "",
    "_interpreters": "",
    "_interpreters.VmapInterpreter": "",
    "_interpreters.VmapInterpreter.batch_size": "",
    "_interpreters.VmapInterpreter.level": "",
    "_interpreters.VmapInterpreter.lower": "",
    "_interpreters.VmapInterpreter.randomness": "",
    "_interpreters.retrieve_all_functorch_interpreters": "",
    "_interpreters.retrieve_current_functorch_interpreter": "",
    "_module._global_backward_hooks": "",
    "_module._global_backward_pre_hooks": "",
    "_module._global_forward_hooks": "",
    "_module._global_forward_pre_hooks": "",
    "_batchnorm": "",
    "_batchnorm._BatchNorm": "",
    "_batchnorm._NormBase": "",
    "torch.ops.aten.native_batch_norm_backward": "",
}
# What torch's own calls cannot do without, so that none is without: the tests are further down.
OF_EVERY_MODULE = {
    *("_parameters", "_buffers", "_modules", "_compiled_call_impl"),
    *watchers._HOOKS,
}


class Without:
    """A module or class of torch's as this package sees it, with one part missing."""

    def __init__(self, whole: Any, path: list[str]) -> None:
        self.whole, (self.name, *self.rest) = whole, path

    def __getattr__(self, name: str) -> Any:
        if name != self.name:
            return getattr(self.whole, name)
        if self.rest:
            return _without(getattr(self.whole, name), self.rest)
        raise AttributeError(name)


class _Kind(type):
    def __instancecheck__(cls, thing: Any) -> bool:
        return isinstance(thing, cls.whole)

    def __getattr__(cls, name: str) -> Any:
        if name == cls.missing:
            raise AttributeError(name)
        return getattr(cls.whole, name)


def _without(whole: Any, path: list[str]) -> Any:
    if isinstance(whole, type):  # isinstance() has to go on working
        return _Kind(whole.__name__, (), {"whole": whole, "missing": path[0]})
    return Without(whole, path)


@pytest.fixture(scope="module")
def whole() -> Results:
    """The results with every part there, by torch's own layers and by the closed forms alike."""
    return {}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    operators.has_operators.cache_clear()
    yield
    operators.has_operators.cache_clear()


@pytest.mark.parametrize("part", PARTS)
def test_results_without_a_part(part: str, whole: Results, monkeypatch: Any) -> None:
    whole.update(whole or results())
    holder, *path = part.split(".")
    for file in FILES:
        if seen := vars(file).get(holder):
            monkeypatch.setattr(file, holder, _without(seen, path) if path else None)
    operators.has_operators.cache_clear()
    found = results()
    assert found.keys() == whole.keys()
    for name, values in whole.items():
        if name == PARTS[part]:
            assert "needs a part that torch" in str(found[name])
            continue
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-10, msg=name)


def test_what_is_compared(whole: Results) -> None:
    """The modes and hooks are called at all, the refusals come, and nothing is zero."""
    whole.update(whole or results())
    assert whole["seen by others"][0].tolist() == [1, 1]
    assert whole["checkpoint"][0].item()
    assert whole["conversion"][0].all()
    assert all(value.isfinite().all() for values in whole.values() for value in values)
    loops = [name for name in whole if name.endswith("True")]
    assert len(loops) == 6
    for name in loops:  # in second order, every task of a loop finds what the others find
        assert all(value.count_nonzero() for value in whole[name]), name
    for name in ("higher, True", "torchopt, True"):
        torch.testing.assert_close(whole[name], whole["hand, True"], rtol=1e-10, atol=1e-10)


def test_without_all_that_is_imported(whole: Results) -> None:
    """In a process of its own: private modules that are not there as the package is imported."""
    whole.update(whole or results())
    code = (
        "import json, sys\n"
        "import torch\n"
        "torch.set_num_threads(1)\n"
        "lost = ['torch._C._functorch', 'torch._functorch.autograd_function',\n"
        "        'torch._functorch.pyfunctorch', 'torch.utils._pytree']\n"
        "kept = {name: sys.modules[name] for name in lost}\n"
        "sys.modules.update(dict.fromkeys(lost))\n"
        "aten = type(torch.ops.aten)\n"
        "find, name = aten.__getattr__, 'native_batch_norm_backward'\n"
        "vars(torch.ops.aten).pop(name, None)\n"
        "def missing(self, key):\n"
        "    if key == name:\n"
        "        raise AttributeError(key)\n"
        "    return find(self, key)\n"
        "aten.__getattr__ = missing\n"
        "import mamlpp_ext\n"
        "from mamlpp_ext import torch_private\n"
        "assert torch_private.transforms._functorch is None and not torch_private.has_operators()\n"
        "aten.__getattr__ = find\n"
        "sys.modules.update(kept)\n"
        "from every_loop import results\n"
        "print(json.dumps({n: [v.tolist() for v in values] for n, values in results().items()}))"
    )
    path = {"PYTHONPATH": f"{TESTS}:{PACKAGE.parent}"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=path
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    for name, values in whole.items():
        tensors = [
            torch.tensor(value, dtype=v.dtype) for value, v in zip(found[name], values, strict=True)
        ]
        torch.testing.assert_close(tensors, values, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("part", ["tree_flatten_with_path", "tree_unflatten", "keystr", ""])
def test_trees_without_a_part(part: str, monkeypatch: Any) -> None:
    tree = {"a": [1, (2, 3)], "b": 4}
    leaves, names, rebuild = torch_private.flatten_tree(tree)
    assert rebuild(leaves) == tree
    lacking = _without(trees._pytree, [part]) if part else None
    monkeypatch.setattr(trees, "_pytree", lacking)
    found, places, made_again = torch_private.flatten_tree(tree)
    assert (found, places) == (leaves, names) == ([1, 2, 3, 4], places)
    assert made_again(leaves) == tree


def test_nodes_of_other_names() -> None:
    """What has no derivative is known by the name of its node; of another name, nothing is said."""
    leaf = torch.ones(1, requires_grad=True)
    assert torch_private.missing_derivatives([None, leaf, leaf * 2]) == []


def test_changes_of_a_tensor() -> None:
    tensor = torch.zeros(1)
    before = torch_private.changes_of(tensor)
    assert torch_private.changes_of(tensor) == before
    assert torch_private.changes_of(tensor.add_(1)) != before
    without = SimpleNamespace()
    assert torch_private.changes_of(without) != torch_private.changes_of(without)


def test_the_quick_apply(whole: Results, monkeypatch: Any) -> None:
    whole.update(whole or results())
    monkeypatch.setattr(torch_private, "quick_apply", lambda function: None)
    found = results()
    for name, values in whole.items():
        torch.testing.assert_close(found[name], values, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("name", sorted(OF_EVERY_MODULE))
def test_torch_itself_needs(name: str) -> None:
    layer = nn.Linear(1, 1)
    holder = layer if name in vars(layer) else nn.Module
    assert hasattr(holder, name)
    source = Path(sys.modules["torch.nn.modules.module"].__file__).read_text(encoding="utf-8")
    assert source.count(f"self.{name}") > 1


def test_a_module_that_holds_things_elsewhere() -> None:
    with pytest.raises(NotImplementedError, match="does not hold its buffers as modules do"):
        torch_private.held(SimpleNamespace(), "buffers")
    layer = nn.Linear(1, 1)
    assert not torch_private.is_hooked(layer)
    del layer._backward_pre_hooks
    assert torch_private.is_hooked(layer)
    assert not torch_private.is_called_plainly(layer)


# ---------------------------------------------------------------------------------------------
# The list is complete.


def _private(name: str) -> bool:
    return len(name) > 1 and name.startswith("_") and not name.startswith("__")


def _trees() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), ast.parse(path.read_text(encoding="utf-8"))


def _names(tree: ast.AST) -> Iterator[str]:
    """Yields what is asked of something by a private name, as code or by a string."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) if _private(name):
                yield name
            case ast.Constant(value=str(name)) if name.isidentifier() and _private(name):
                yield name
            case ast.ImportFrom(module=str(module), names=names) if module.startswith("torch"):
                yield from (alias.name for alias in names if _private(alias.name))
                yield from (part for part in module.split(".") if _private(part))
            case ast.Import(names=names):
                parts = (part for alias in names for part in alias.name.split("."))
                yield from (part for part in parts if _private(part))


def _defined(tree: ast.AST) -> Iterator[str]:
    """Yields the private names that a file of the package gives things of its own."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Name(id=name, ctx=ast.Store()) | ast.alias(asname=str(name)):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield name


# torch's own layers override it as ours do; of NamedTuple; of higher, as its adapter's docstring
# says (tests/integrations/test_peers.py).
ELSEWHERE = {"_load_from_state_dict", "_asdict", "_replace", "_extra_state"}
ADAPTER_OF_HIGHER = {
    f"integrations/{name}.py" for name in ("attributes", "higher", "twins", "unpatched")
}
OF_HIGHER = {
    *("_apply_override", "_fmodel", "_grad_callback", "_group_to_param_list"),
    *("_refill_params_box", "_track_higher_grads", "_update", "_flat_weights_names"),
    *("_root_ref", "_fast_params", "_flat_weights", "_param_names"),
}


def test_no_other_file_names_a_private_part_of_torch() -> None:
    ours = {name for _, tree in _trees() for name in _defined(tree)}
    known = OF_EVERY_MODULE | {name for part in PARTS for name in part.split(".")}
    found = {}
    for path, tree in _trees():
        if path.startswith("torch_private"):
            continue
        allowed = ELSEWHERE | (OF_HIGHER if path in ADAPTER_OF_HIGHER else set())
        # A name of torch's that something of ours has in the same file, too, is ours there.
        allowed |= (ours - known) | set(_defined(tree))
        found[path] = set(_names(tree)) - allowed
    assert not any(found.values()), {path: names for path, names in found.items() if names}


def test_every_private_part_is_taken_away_in_some_test() -> None:
    taken = {name for part in PARTS for name in part.split(".")} | OF_EVERY_MODULE
    taken |= {"_version", "_global", "_getframe"}  # of tensors, before hooks, and of sys
    for path, tree in _trees():
        if path.startswith("torch_private"):
            missing = set(_names(tree)) - taken - set(_defined(tree))
            assert not missing, f"{missing} of {path} is in no list of this file"
