"""Every part of torch's own that is not public and that this package asks for.

Where one is missing, in a torch older or newer than the tested ones, the answer is the careful one:
results stay right, and what is only quicker is left out (``tests/test_torch_private.py`` takes each
away in turn). What each function says when its part is missing is in its docstring.

- ``transforms``: ``torch._C._are_functorch_transforms_active``, ``_functorch`` (``_add_batch_dim``,
  ``_unwrap_batched``, ``is_legacy_batchedtensor``), the interpreters of ``torch._functorch``,
  ``VmapInfo``, ``DisableTorchFunction``: closed forms and fused layers are left out.
  ``forward_ad._current_level``: likewise; ``_set_fwd_grad_enabled``: forward mode is refused. The
  ``apply`` beneath ``autograd.Function``'s: that one.
- ``watchers``: ``_current_graph_task_id``: the stack is read. ``_len_torch_function_stack``,
  ``_len_torch_dispatch_stack``, the hooks of a module and of all, ``_compiled_call_impl``: layers
  are called one by one.
- ``modules``: ``_BatchNorm``, ``_NormBase``: the layers with a public name. ``_parameters``,
  ``_buffers``, ``_modules``: refused.
- ``operators``: ``_foreach_addcmul``: one after the other. Operators that no documentation names:
  closed forms are left out. The names of graph nodes: torch's own message comes, later.
  ``_version`` of a tensor: it counts as written to. ``_cuda_clearCublasWorkspaces``: CUDA graphs
  may share a workspace.
- ``weight_norm``: ``torch._weight_norm``: it is not replaced.
- ``trees``: ``torch.utils._pytree``: tuples, lists and dicts alone are taken apart.

Elsewhere in the package no private name of torch stands but ``_load_from_state_dict``, which
torch's own layers override as ours do.
"""

from mamlpp_ext.torch_private.modules import (
    forget_compiled,
    held,
    hold_parameters,
    is_batch_norm,
    keeps_statistics,
    plain_names,
)
from mamlpp_ext.torch_private.operators import (
    changes_of,
    forget_workspaces,
    graph_leaves,
    graph_names,
    has_operators,
    missing_derivatives,
    subtract_products,
)
from mamlpp_ext.torch_private.transforms import (
    forward_mode_active,
    forward_mode_enabled,
    innermost_vmap,
    is_wrapped,
    modes_hidden,
    only_vmap_active,
    quick_apply,
    takes_closed_forms,
    transforms_active,
    unwrapped,
    vmap_info,
    wrapped,
)
from mamlpp_ext.torch_private.trees import flatten_tree
from mamlpp_ext.torch_private.watchers import (
    global_hooks,
    hooks_of,
    in_backward,
    is_called_plainly,
    is_hooked,
    modes_active,
)
from mamlpp_ext.torch_private.weight_norm import DifferentiableWeightNorm, has_weight_norm

__all__ = [
    "DifferentiableWeightNorm",
    "changes_of",
    "flatten_tree",
    "forget_compiled",
    "forget_workspaces",
    "forward_mode_active",
    "forward_mode_enabled",
    "global_hooks",
    "graph_leaves",
    "graph_names",
    "has_operators",
    "has_weight_norm",
    "held",
    "hold_parameters",
    "hooks_of",
    "in_backward",
    "innermost_vmap",
    "is_batch_norm",
    "is_called_plainly",
    "is_hooked",
    "is_wrapped",
    "keeps_statistics",
    "missing_derivatives",
    "modes_active",
    "modes_hidden",
    "only_vmap_active",
    "plain_names",
    "quick_apply",
    "subtract_products",
    "takes_closed_forms",
    "transforms_active",
    "unwrapped",
    "vmap_info",
    "wrapped",
]
