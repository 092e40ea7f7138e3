"""Fully sharded data parallel training (FSDP2, ``torch.distributed.fsdp.fully_shard``).

A unit, whose parameters are gathered and whose gradients are reduced at once, is a recursion: its
layers are gathered once for all depths. With layers as units a shared layer would be gathered and
reduced at every depth; and K/V that later depths see, or that tokens leave as they exit, go out of
a layer beside its output, where the hooks of a unit do not see them. The layers of a model that
does not recur are units of their own.

What remains, the embedding, the last norm and the head, is the root's: the weight of tied
embeddings is used outside of the module that holds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from mor_ext.models import MoRForCausalLM

MODEL, OPTIMIZER, SCHEDULER = "model.safetensors", "optimizer.pt", "scheduler.pt"
GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def shard(model: MoRForCausalLM) -> None:
    """Shards the parameters, those of the first process, over all processes; in place."""
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    config = model.config
    for stage in model.recursions():
        if config.routing == "none" and config.num_recursions == 1:
            for layer in stage.block.layers:
                fully_shard(layer)
        else:
            fully_shard(stage)
    fully_shard(model)


class ShardedTrainer(Trainer):
    """A Trainer that shards the model if ``sharded``; where the Trainer's own FSDP falls short.

    accelerate wraps classes of modules, which cannot tell apart what is above; it has FSDP on GPUs
    alone; and it finds the optimizer's parameters again by the address of their shard, which is one
    for all of the empty shards that small routers have. So the Trainer is told that the model was
    sharded as it was loaded, which leaves all of it to the model but checkpoints.

    Those have whole parameters and the optimizer's whole state, gathered by the first process: they
    serve any number of processes.
    """

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, sharded: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sharded = sharded and dist.is_initialized()
        if self.sharded:
            shard(self.model)
            self.model._is_fsdp_managed_module = True
            self.is_distributed_loading_by_transformers = True

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.sharded:
            return super().save_model(output_dir, _internal_call)
        state = _arrived(get_model_state_dict(self.model, options=GATHER))
        if self.args.should_save:
            self._save(output_dir, state_dict=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = get_optimizer_state_dict(self.model, self._bare_optimizer(), options=GATHER)
        if self.args.should_save:
            torch.save(_arrived(state), Path(output_dir) / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.sharded:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        first = self.args.process_index == 0
        state: dict[str, Any] = {}
        if first:
            state |= load_file(Path(resume_from_checkpoint) / MODEL)
        set_model_state_dict(self.model, state, options=SPREAD)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        first = self.args.process_index == 0
        state = torch.load(Path(checkpoint) / OPTIMIZER, weights_only=True) if first else {}
        set_optimizer_state_dict(self.model, self._bare_optimizer(), state, options=SPREAD)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER))

    def _bare_optimizer(self) -> torch.optim.Optimizer:
        return self.optimizer.optimizer  # accelerate's wrapper is around it


def _arrived(state: Any) -> Any:
    """A tensor gathered on the CPU may still be on its way: a copy waits for it."""
    if isinstance(state, dict):
        return {name: _arrived(value) for name, value in state.items()}
    return state.clone() if isinstance(state, Tensor) else state
