"""What the guide's scripts use of learn2learn, written anew: it no longer installs everywhere.

``MAML``, ``clone_module`` and ``update_module`` do what learn2learn's of these names do: a clone
has weights with a graph back to the original's and shares its buffers; ``update_module`` puts
``p + p.update`` in the place of every ``p``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MAML(nn.Module):
    """A model whose clones adapt."""

    def __init__(self, model: nn.Module, lr: float, first_order: bool = False) -> None:
        super().__init__()
        self.module, self.lr, self.first_order = model, lr, first_order

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def clone(self, first_order: bool | None = None) -> MAML:
        order = self.first_order if first_order is None else first_order
        return MAML(clone_module(self.module), self.lr, order)

    def adapt(self, loss: Tensor, first_order: bool | None = None) -> None:
        order = self.first_order if first_order is None else first_order
        params = [*self.module.parameters()]
        grads = torch.autograd.grad(loss, params, create_graph=not order)
        for p, grad in zip(params, grads, strict=True):
            p.update = -self.lr * grad
        update_module(self.module)


def clone_module(module: nn.Module) -> nn.Module:
    """Returns a module of the same classes, whose weights are clones with a graph."""
    tensors, modules = {}, {}

    def cloned(one: nn.Module) -> nn.Module:
        if one in modules:
            return modules[one]
        new = modules[one] = one.__new__(type(one))
        new.__dict__ = dict(one.__dict__)
        new._parameters = {
            name: None if p is None else tensors.setdefault(p, p.clone())
            for name, p in one._parameters.items()
        }
        new._buffers = dict(one._buffers)  # the same tensors
        new._modules = {n: None if m is None else cloned(m) for n, m in one._modules.items()}
        return new

    return cloned(module)


def update_module(module: nn.Module) -> nn.Module:
    """Puts ``p + p.update`` in the place of every weight that has an update."""
    updated = {}
    for one in module.modules():
        for name, p in one._parameters.items():
            if getattr(p, "update", None) is not None and p not in updated:
                updated[p], p.update = p + p.update, None
            one._parameters[name] = updated.get(p, p)
    return module
