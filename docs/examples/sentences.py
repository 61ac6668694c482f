"""A small BERT, whole or with LoRA, and made-up few-shot tasks of sentences for it.

The models are transformers' and peft's own, made from a configuration: nothing is downloaded.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

VOCABULARY, LENGTH, TOPIC = 30, 8, 4  # words, words of a sentence, words of a class
WAYS, SHOTS, TARGETS, TASKS, STEPS = 5, 2, 5, 4, 5
Sentences = dict[str, Tensor]
Batch = tuple[Sentences, Tensor, Sentences, Tensor]


def bert(width: int = 32) -> nn.Module:
    """Returns a BERT of one layer that classifies sentences, without dropout."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,  # from its own 0.02 it needs a pretraining
        num_labels=WAYS,
    )
    return BertForSequenceClassification(config)


def lora_bert(width: int = 32) -> nn.Module:
    """Returns it with LoRA in its attention; all else but head and LayerNorms is frozen."""
    layers, others = ["query", "value"], ["classifier", "LayerNorm"]
    return get_peft_model(bert(width), LoraConfig(target_modules=layers, modules_to_save=others))


class Topics:
    """Draws meta-batches: each class of a task has four words, 70 % of its sentences are of them.

    Every task deals the words anew, so that what a word means is learned from its support set.
    """

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def sample(self) -> Batch:
        """Returns support sentences [T, S, length] as ``input_ids``, labels, and the targets."""
        deals = [torch.randperm(VOCABULARY, generator=self.random) for _ in range(TASKS)]
        topics = torch.stack(deals)[:, : WAYS * TOPIC].view(TASKS, WAYS, TOPIC)
        return *self._draw(topics, SHOTS), *self._draw(topics, TARGETS)

    def _draw(self, topics: Tensor, count: int) -> tuple[Sentences, Tensor]:
        labels = torch.arange(WAYS).repeat(count).expand(TASKS, -1)
        shape = (*labels.shape, LENGTH)
        places = torch.randint(TOPIC, shape, generator=self.random)
        words = topics[torch.arange(TASKS)[:, None, None], labels[..., None], places]
        others = torch.randint(VOCABULARY, shape, generator=self.random)
        kept = torch.rand(shape, generator=self.random) < 0.7
        return {"input_ids": torch.where(kept, words, others)}, labels


def tasks(seed: int, tests: int) -> tuple[Topics, list[Batch]]:
    """Returns what draws the meta-batches to train on, and ``tests`` batches of other tasks."""
    others = Topics(1_000_000 + seed)
    return Topics(seed), [others.sample() for _ in range(tests)]
