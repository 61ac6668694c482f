"""Few-shot handwriting with torch.func: ``_before`` is MAML, ``_after`` MAML++."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, replace_all_batch_norm_modules_, vmap

from few_shot import conv_net
from guide import STEPS, WAYS, evaluate, tasks


def main(epochs: int = 10, iterations: int = 20, tests: int = 25, seed: int = 0) -> float:
    """Returns the accuracy on unseen classes after ``epochs`` times ``iterations``."""
    torch.manual_seed(seed)
    train_tasks, test_batches = tasks(seed, tests)
    net = replace_all_batch_norm_modules_(conv_net(1, WAYS, filters=32, size=8))
    meta_opt = torch.optim.Adam(net.parameters(), lr=1e-3)

    def adapt(params, x_spt, y_spt, x_qry, y_qry):
        for _ in range(STEPS):
            grads = grad(lambda p: F.cross_entropy(functional_call(net, p, x_spt), y_spt))(params)
            params = {name: p - 0.1 * grads[name] for name, p in params.items()}
        logits = functional_call(net, params, x_qry)
        return F.cross_entropy(logits, y_qry), logits

    def adapt_to_all(batch):
        return vmap(partial(adapt, dict(net.named_parameters())))(*batch)

    @torch.no_grad()
    def predict(batch):
        return adapt_to_all(batch)[1]

    for epoch in range(epochs):
        for _ in range(iterations):
            meta_opt.zero_grad()
            losses, _ = adapt_to_all(train_tasks.sample())
            losses.mean().backward()
            meta_opt.step()
        accuracy = evaluate(epoch, predict, test_batches)
    return accuracy


if __name__ == "__main__":
    main()
