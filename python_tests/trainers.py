"""Tiny models, texts and trainers that tests of training share."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import default_data_collator

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training.dataset import PackedDataset
from mor_ext.training.recipe import DataRecipe, RunRecipe, TrainingRecipe
from mor_ext.training.tokenizer import Tokens
from mor_ext.training.trainer import MoRTrainer, training_arguments

LENGTH = 24
QUIET = {"report_to": [], "save_strategy": "no", "eval_strategy": "no"}


def tiny(routing: str, **fields: Any) -> MoRForCausalLM:
    recursions = {"mixture_of_depths": 1, "action": 2}.get(routing, 3)
    if routing == "fixed_depth":
        fields["fixed_depth"] = 2
    torch.manual_seed(0)
    return MoRForCausalLM(
        MoRConfig(
            **{
                "vocab_size": 64,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2 + 2 * recursions if routing != "mixture_of_depths" else 6,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "initializer_range": 0.2,
                "num_recursions": recursions,
                "routing": routing,
                **fields,
            }
        )
    )


def windows(count: int, seed: int = 0) -> PackedDataset:
    """So many windows of random tokens, of 1 or 2 bytes each."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (count * LENGTH,), generator=generator).int()
    return PackedDataset(Tokens(ids.numpy(), (1 + ids % 2).numpy()), LENGTH)


def trainer_of(
    model: MoRForCausalLM,
    output: str | Path,
    train: Dataset,
    held_out: Dataset | None = None,
    steps: int = 3,
    sharded: bool = False,
    others: dict[str, Any] = QUIET,
    **training: Any,
) -> MoRTrainer:
    settings = {"learning_rate": 1e-2, "warmup": 0.0, "log_every": 1, "length": LENGTH}
    recipe = RunRecipe(
        DataRecipe(files="not read"),
        TrainingRecipe(steps=steps, **settings | training),
        output=str(output),
    )
    return MoRTrainer(
        model,
        training_arguments(recipe, steps, **others),
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=default_data_collator,
        sharded=sharded,
    )


def logged(trainer: MoRTrainer, name: str) -> list[float]:
    return [record[name] for record in trainer.state.log_history if name in record]
