"""Hugging Face's Trainer for these models: routers that learn after a step, and what it reports."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import EvalLoopOutput

from mor_ext.models import MoRForCausalLM
from mor_ext.training.checkpoints import STATE
from mor_ext.training.metrics import Meter
from mor_ext.training.profiling import routing_shares
from mor_ext.training.recipe import RunRecipe
from mor_ext.training.sharding import ShardedTrainer

Batch = dict[str, Tensor]
SCHEDULES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay"}  # of transformers


def training_arguments(recipe: RunRecipe, steps: int, **others: Any) -> TrainingArguments:
    """Of a recipe, for a run of so many optimizer steps; ``others`` are added or replaced.

    AdamW leaves out norms and biases of weight decay, as the Trainer's rule by name has it.
    """
    training = recipe.training
    shape: dict[str, Any] = {"min_lr_rate": training.final}
    if training.schedule == "wsd":
        decay = round(training.decay * steps)
        shape = {
            "num_decay_steps": decay,
            "decay_type": "linear",
            "min_lr_ratio": training.final,
        }
    settings: dict[str, Any] = {
        "output_dir": recipe.output,
        "max_steps": steps,
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation,
        "optim": "adamw_torch_fused",
        "learning_rate": training.learning_rate,
        "lr_scheduler_type": SCHEDULES[training.schedule],
        "lr_scheduler_kwargs": shape,
        "warmup_steps": round(training.warmup * steps),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.betas[0],
        "adam_beta2": training.betas[1],
        "max_grad_norm": training.clip,
        "bf16": training.bf16,
        "activation_checkpointing": training.gradient_checkpointing,
        "torch_compile": training.compile,
        "seed": training.seed,
        "data_seed": training.seed,
        "logging_steps": training.log_every,
        "eval_strategy": "steps",
        "eval_steps": training.eval_every,
        "save_steps": training.save_every,
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "use_cache": True,  # it ends up in the model's config
        "remove_unused_columns": False,  # num_bytes
        "prediction_loss_only": True,
        "logging_nan_inf_filter": False,  # would wait for the device at every batch
        "accelerator_config": {"dispatch_batches": False},
        "ddp_find_unused_parameters": False,
        "ddp_broadcast_buffers": False,  # loads of routers are each process's own
    }
    return TrainingArguments(**settings | others)


class MoRTrainer(ShardedTrainer):
    """Trains a :class:`~mor_ext.models.MoRForCausalLM`.

    Items of the data sets have ``input_ids`` and ``labels``, ``[length]``, and may have
    ``num_bytes``; see :mod:`mor_ext.training.dataset`. The log has, beside what the Trainer
    writes, what a :class:`Meter` reads: of training batches, and with the prefix ``eval_`` of
    held-out text by the causal rule; and ``tokens_per_second`` of all processes. No batch waits
    for a number of it.

    With several batches a step, or several processes, the losses are divided by the labels of the
    whole step, so that it is the step of one large batch; but the balance loss of token choice, a
    product of means, is that of each batch of a process.

    Args:
        sharded: FSDP2 instead of DDP, see :mod:`mor_ext.training.sharding`.
    """

    model: MoRForCausalLM

    def __init__(self, model: MoRForCausalLM, args: TrainingArguments, **others: Any) -> None:
        super().__init__(model, args, **others)
        self.remove_callback(PrinterCallback)
        self.add_callback(RouterCallback)
        self.model_accepts_loss_kwargs = True  # forward takes num_items_in_batch
        self.trained = Meter(model, args.device)
        self.held_out = Meter(model, args.device)
        self.clock = Clock()
        self.add_callback(self.clock)

    def is_last(self, checkpoint: Path) -> bool:
        """Whether a run has no steps left after it."""
        return _state_of(checkpoint).global_step >= self.args.max_steps

    def restore(self, checkpoint: Path) -> None:
        """The model and the log of a checkpoint, to be evaluated."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = _state_of(checkpoint)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                # It sets that when training begins, and else writes to where the process runs.
                callback.logging_dir = f"{self.args.output_dir}/runs/evaluation"

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        num_bytes = inputs.pop("num_bytes", None)
        loss, output = super().compute_loss(model, inputs, True, num_items_in_batch)
        self.trained.add(output, inputs["labels"], num_bytes)
        self.clock.tokens += inputs["labels"].numel()
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # of training
            read = self.trained.read(self._sum)
            logs |= {name: value for name, value in read.items() if name != "loss"}
            logs["tokens_per_second"] = self.clock.rate() * self.args.world_size
        super().log(logs, start_time)

    def evaluation_loop(
        self,
        dataloader: DataLoader[Batch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.held_out.reset()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        assert output.metrics is not None
        for name, value in self.held_out.read(self._sum).items():
            output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    @torch.no_grad()
    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs = self._prepare_inputs(inputs)
        num_bytes, labels = inputs.get("num_bytes"), inputs["labels"]
        count = self._own_rows(len(labels))
        # A process that has none left goes along all the same: others may wait for its weights.
        ids, scored = inputs["input_ids"][: max(1, count)], labels[: max(1, count)]
        output = model(input_ids=ids, labels=scored, logits_to_keep=1)
        trained = None
        if self.held_out.routed and self.model.causal:
            trained = model(input_ids=ids, causal=False, logits_to_keep=1)
        if count:
            self.held_out.add(
                output, scored, None if num_bytes is None else num_bytes[:count], trained
            )
        return output.loss.detach(), None, None

    def _own_rows(self, rows: int) -> int:
        """How many of this process's rows are not repeated to fill up the last batch."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return rows
        return min(rows, max(0, state.remainder - rows * self.args.process_index))

    def _sum(self, tensor: Tensor) -> Tensor:
        return self.accelerator.reduce(tensor, "sum")

    def router_share(self, inputs: Batch) -> float:
        """The part of a training step's CPU time that goes to routing, gather and scatter.

        Measured on one batch, without compilation, which leaves no trace of whose an op was, and
        without DDP. Leaves the gradients empty, but not the loads of routers: for after training.
        """
        model = self.model.train()
        inputs = self._prepare_inputs({name: inputs[name] for name in ("input_ids", "labels")})
        shares = routing_shares(lambda: model(**inputs).loss.backward())
        model.zero_grad()
        return sum(shares.values())


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE))


class RouterCallback(TrainerCallback):
    """What routers learn without a gradient, after every optimizer step."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].update_routers()


class Clock(TrainerCallback):
    """The time of training steps, without evaluation and checkpoints."""

    def __init__(self) -> None:
        self.tokens, self.seconds = 0, 0.0
        self.begun = self.ended = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = time.perf_counter()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.ended = time.perf_counter()
        self.seconds += self.ended - self.begun

    def rate(self) -> float:
        """Tokens of this process a second, since it was last asked.

        To be called when the device is idle: what it still had to do as the last step ended counts.
        """
        seconds = self.seconds + time.perf_counter() - self.ended
        tokens, self.tokens, self.seconds = self.tokens, 0, 0.0
        return tokens / seconds
