"""Models of today, made from a configuration, in every path and both orders: right or refused.

BERT, GPT-2, Llama and ViT of transformers, LoRA of peft, a MobileNetV3, an LSTM, a siamese net.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from any_model import PATHS, TASKS, assert_same, outcome, written_out

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # peft 0.21 asks transformers 5 by the older name.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

WORDS, LENGTH, CLASSES = 20, 6, 3
BY_VMAP = ("task_batch_loss", "rematerialize")
Case = tuple[Callable[[], nn.Module], Callable[[int], Any], dict[str, str]]


def ids(examples: int) -> Tensor:
    return torch.randint(2, WORDS, (TASKS, examples, LENGTH))


def masked(examples: int) -> dict[str, Tensor]:
    mask = torch.ones(TASKS, examples, LENGTH, dtype=torch.long)
    mask[..., -2:] = 0
    return {"input_ids": ids(examples), "attention_mask": mask}


def masked_in_four(examples: int) -> dict[str, Tensor]:
    """As transformers makes it of the other, so that it asks nothing of it."""
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask = causal.expand(TASKS, examples, 1, LENGTH, LENGTH)
    return {"input_ids": ids(examples), "attention_mask": mask}


def images(examples: int) -> Tensor:
    return torch.randn(TASKS, examples, 1, 8, 8)


def signals(examples: int) -> Tensor:
    return torch.randn(TASKS, examples, 5, 4)


def pairs(examples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(TASKS, examples, 4), torch.randn(TASKS, examples, 4)


def made(name: str, **settings: Any) -> nn.Module:
    """A classifier of transformers, of one layer without dropout."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")
    width = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    words = {"vocab_size": WORDS, "max_position_embeddings": 16, "pad_token_id": 0}
    special = {"bos_token_id": 1, "eos_token_id": 1}
    sizes: dict[str, dict[str, Any]] = {
        "Bert": {**width, **dropout, **words},
        "Llama": {**width, **words, **special, "num_key_value_heads": 2},
        "GPT2": {
            **{"vocab_size": WORDS, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0},
            **special,
        },
        "ViT": {**width, **dropout, "image_size": 8, "patch_size": 4, "num_channels": 1},
    }
    kind = "Image" if name == "ViT" else "Sequence"
    model = getattr(transformers, f"{name}For{kind}Classification")
    # Of their own small weights (0.02) next to nothing would arrive in the rates.
    settings = {**sizes[name], "initializer_range": 0.5, **settings}
    return model(config(num_labels=CLASSES, **settings))


def with_lora(name: str, *layers: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    # Else one of its two matrices is zeros, and with it every gradient of the other.
    adapters = peft.LoraConfig(r=2, target_modules=[*layers], init_lora_weights=False)
    return peft.get_peft_model(made(name), adapters)


class SqueezeExcite(nn.Module):
    """A MobileNetV3's: channels weighed by what they are on average."""

    def __init__(self, width: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up, self.gate = nn.Conv2d(width, 2, 1), nn.Conv2d(2, width, 1), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Relu6Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x + 3) / 6


def mobile_net(gate: nn.Module) -> nn.Module:
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    body = nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Hardswish(), depthwise
    return nn.Sequential(*body, SqueezeExcite(4, gate), nn.Flatten(), nn.Linear(64, CLASSES))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.lstm(x)[0][:, -1])}


@dataclass
class Compared:
    logits: Tensor
    distance: Tensor


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Compared:
        apart = (self.body(left).tanh() - self.body(right).tanh()).square()
        return Compared(self.head(apart), apart.sum(-1))


DATA_DEPENDENT = dict.fromkeys(BY_VMAP, "pass chunk_size=1 to run the tasks one by one")
NO_PEFT = {"higher": "use task_batch_loss or mamlpp_ext.integrations.torchopt, which patch nothing"}
# The model, its inputs, and by path what refuses it says.
CASES: dict[str, Case] = {
    "BERT": (lambda: made("Bert"), ids, {}),
    "BERT, eager": (lambda: made("Bert", attn_implementation="eager"), ids, {}),
    "BERT, mask": (lambda: made("Bert"), masked, DATA_DEPENDENT),
    "BERT, mask of attention": (lambda: made("Bert"), masked_in_four, {}),
    "GPT-2": (lambda: made("GPT2"), masked, DATA_DEPENDENT),
    "Llama": (lambda: made("Llama"), ids, {}),
    "Llama, mask": (lambda: made("Llama"), masked, DATA_DEPENDENT),
    "ViT": (lambda: made("ViT"), images, {}),
    "LoRA in BERT": (lambda: with_lora("Bert", "query", "value"), ids, NO_PEFT),
    "LoRA in Llama": (lambda: with_lora("Llama", "q_proj", "v_proj"), ids, NO_PEFT),
    "MobileNetV3": (lambda: mobile_net(Relu6Gate()), images, {}),
    "LSTM": (Recurrent, signals, {}),
    "siamese": (Siamese, pairs, {}),
}


def of_logits(output: Any, labels: Tensor) -> Tensor:
    logits = output if isinstance(output, Tensor) else None
    if logits is None:
        logits = output["logits"] if isinstance(output, dict) else output.logits
    return F.cross_entropy(logits, labels)


def of_case(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    model, inputs, _ = CASES[name]
    labels = [torch.randint(CLASSES, (TASKS, examples)) for examples in (3, 4)]
    net = model()
    batch = (inputs(3), labels[0], inputs(4), labels[1])
    return net, batch, ["*lora_*"] if name.startswith("LoRA") else None


@pytest.mark.parametrize("second_order", [True, False], ids=["second", "first"])
@pytest.mark.parametrize("name", CASES)
def test_every_path_is_right_or_names_another(name: str, second_order: bool) -> None:
    net, batch, adapt = of_case(name)
    settings = {"second_order": second_order, "adapt": adapt}
    expected = outcome(written_out, net, batch, of_logits, **settings)
    assert expected["rates"].abs().max() > 1e-4
    for path, run in PATHS.items():
        refusal = CASES[name][2].get(path)
        if refusal is None:
            assert_same(outcome(run, net, batch, of_logits, **settings), expected)
        else:
            with pytest.raises((RuntimeError, TypeError)) as info:
                outcome(run, net, batch, of_logits, **settings)
            assert refusal in str(info.value)


@pytest.mark.parametrize("path", PATHS)
def test_hardsigmoid_has_a_remedy_in_second_order(path: str) -> None:
    torch.manual_seed(0)
    net = mobile_net(nn.Hardsigmoid())
    _, batch, _ = of_case("MobileNetV3")
    expected = outcome(written_out, net, batch, of_logits, second_order=False)
    assert_same(outcome(PATHS[path], net, batch, of_logits, second_order=False), expected)
    with pytest.raises(RuntimeError, match=r"second_order=False\), or use F.relu6\(x \+ 3\) / 6"):
        outcome(PATHS[path], net, batch, of_logits, second_order=True)
