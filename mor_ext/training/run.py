"""A run, from its recipe to the folder that holds what came of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import Subset
from transformers import default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from mor_ext.analysis.flops import aimed_shares, expected_flops, is_routed, layout
from mor_ext.analysis.report import write_report
from mor_ext.evaluation.dump import pieces
from mor_ext.evaluation.score import score
from mor_ext.models import MoRConfig, MoRForCausalLM, from_llama
from mor_ext.training.checkpoints import check, checkpoints, last_whole
from mor_ext.training.corpus import Corpus, load_corpus
from mor_ext.training.dataset import PackedDataset
from mor_ext.training.loop import keep_freed_memory
from mor_ext.training.progress import ProgressCallback
from mor_ext.training.recipe import RunRecipe
from mor_ext.training.tokenizer import load_tokenizer
from mor_ext.training.trainer import MoRTrainer, training_arguments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAGE = "index.html"
SHOWN = 16  # windows of held-out text on the page


@dataclass
class Result:
    metrics: dict[str, float]  # of the whole held-out text and of training
    page: Path

    def shown(self) -> dict[str, str]:
        """Labels and numbers for people."""
        return {
            label: form.format(self.metrics[name])
            for name, (label, form) in LABELS.items()
            if name in self.metrics
        }


LABELS = {
    "eval_nll": ("loss, nats a token", "{:.4f}"),
    "eval_bits_per_byte": ("bits a byte", "{:.4f}"),
    "eval_effective_depth": ("layers a token", "{:.3f}"),
    "eval_agreement": ("same depth by the rule of training", "{:.2%}"),
    "eval_dead_tokens": ("positions that never went to the last depth", "{:.2%}"),
    "eval_max_vio": ("MaxVio of the loads", "{:.3f}"),
    "eval_load_entropy": ("entropy of the loads, nats", "{:.3f}"),
    "tokens_per_second": ("tokens a second, in training", "{:,.0f}"),
    "router_share": ("routing, share of a training step", "{:.2%}"),
}


def train(recipe: RunRecipe, resume: str | None, console: Console) -> Result | None:
    """Trains, evaluates, and writes model, tokenizer, recipe, logs and page to the output folder.

    Under ``torchrun`` every process calls it; all but the first get None.

    Args:
        resume: a checkpoint, or "auto": the last whole one of the output folder, if there is one.

    Raises:
        ValueError: something that the recipe names is not there or does not fit; the output folder
            has checkpoints and ``resume`` is None; the checkpoint is not whole.
    """
    disable_progress_bar()  # for each file that is read or written
    if recipe.training.keep_freed_memory:
        keep_freed_memory()
    processes = PartialState(cpu=not torch.cuda.is_available())
    if recipe.training.fsdp and processes.num_processes == 1:
        raise ValueError("training.fsdp must be false for one process, got true")
    checkpoint = find_checkpoint(recipe, resume)
    with processes.main_process_first():  # the others take its tokenizer
        made = checkpoint is not None or not processes.is_main_process
        corpus = load_corpus(recipe, load_tokenizer(recipe.output) if made else None)
        if processes.is_main_process:
            corpus.tokenizer.save_pretrained(recipe.output)
            recipe.save(recipe.output)
    trainer = make_trainer(recipe, corpus, processes.num_processes, console)
    if checkpoint is not None and trainer.is_last(checkpoint):
        trainer.restore(checkpoint)  # the Trainer would take one step more
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _finish(trainer, recipe, corpus)


def find_checkpoint(recipe: RunRecipe, resume: str | None) -> Path | None:
    """What a run goes on from; see :func:`train`."""
    if resume is None:
        found = checkpoints(recipe.output)
        if found:
            raise ValueError(
                f"output must have no checkpoints without --resume, got {found[0]} in it"
            )
        return None
    if resume == "auto":
        return last_whole(recipe.output)
    check(Path(resume))
    return Path(resume)


def make_trainer(recipe: RunRecipe, corpus: Corpus, processes: int, console: Console) -> MoRTrainer:
    set_seed(recipe.training.seed)
    model = build_model(recipe, corpus.tokenizer)
    return MoRTrainer(
        model,
        training_arguments(recipe, optimizer_steps(recipe, corpus.train, processes)),
        train_dataset=corpus.train,
        eval_dataset=spread(corpus.validation, recipe.training.eval_windows),
        processing_class=corpus.tokenizer,
        data_collator=default_data_collator,
        callbacks=[ProgressCallback(console)],
        sharded=recipe.training.fsdp,
    )


def build_model(recipe: RunRecipe, tokenizer: PreTrainedTokenizerFast) -> MoRForCausalLM:
    """Raises ValueError for fields of the model that do not fit each other or the tokenizer."""
    fields = dict(recipe.model)
    if "from_llama" in fields:
        model = from_llama(fields.pop("from_llama"), **fields)
    else:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {name: getattr(tokenizer, name) for name in special}
        model = MoRForCausalLM(MoRConfig(**{"vocab_size": len(tokenizer)} | ids | fields))
    config = model.config
    if config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {len(tokenizer)}, "
            f"got {config.vocab_size}"
        )
    if config.max_position_embeddings < recipe.training.length:
        raise ValueError(
            "model.max_position_embeddings must be at least training.length = "
            f"{recipe.training.length}, got {config.max_position_embeddings}"
        )
    return model


def optimizer_steps(recipe: RunRecipe, windows: Any, processes: int) -> int:
    training = recipe.training
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None
    batches = -(-len(windows) // (training.batch_size * processes))
    return max(1, round(training.epochs * -(-batches // training.gradient_accumulation)))


def spread(windows: PackedDataset, count: int) -> PackedDataset | Subset[dict[str, torch.Tensor]]:
    """So many of the windows, at equal distances."""
    if count >= len(windows):
        return windows
    return Subset(windows, [i * len(windows) // count for i in range(count)])


def _finish(trainer: MoRTrainer, recipe: RunRecipe, corpus: Corpus) -> Result | None:
    trainer.save_model()  # a failure from here on does not lose it
    metrics = trainer.evaluate(corpus.validation)
    items = [
        corpus.validation[i % len(corpus.validation)] for i in range(recipe.training.batch_size)
    ]
    trainer.log({"router_share": trainer.router_share(default_data_collator(items))})
    trainer.save_state()
    metrics |= _last(trainer.state.log_history, "tokens_per_second", "router_share")
    if not trainer.is_world_process_zero():
        return None
    output = Path(recipe.output)
    (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    result = Result(metrics, output / PAGE)
    model = MoRForCausalLM.from_pretrained(output)  # whole, as a sharded one is not
    _write_page(result, model.eval(), recipe, corpus, trainer.state.log_history)
    return result


def _last(log: list[dict[str, float]], *names: str) -> dict[str, float]:
    return {name: record[name] for name in names for record in log if name in record}


def _write_page(
    result: Result,
    model: MoRForCausalLM,
    recipe: RunRecipe,
    corpus: Corpus,
    log: list[dict[str, Any]],
) -> None:
    items = [corpus.validation[i] for i in range(min(SHOWN, len(corpus.validation)))]
    batch = default_data_collator(items)
    scores = score(model, batch["input_ids"], causal=model.causal)
    texts = pieces(corpus.tokenizer, batch["input_ids"][0].tolist())
    results: Mapping[str, object] = result.shown() | {
        "parameters": model.num_parameters(),
        "text": str(recipe.data.files or recipe.data.dataset),
    }
    write_report(
        result.page,
        Path(recipe.output).name,
        model.config,
        results,
        log,
        [text.encode() for text in texts],
        scores.stage_depth,
        scores.nll.masked_fill(~scores.scored, torch.nan),
        subtitle=f"{model.config.routing}, {model.config.num_hidden_layers} unrolled layers",
    )


@dataclass
class Facts:
    """Of a model, without training it."""

    parameters: int
    embeddings: int  # of these, in embedding and head
    layers: int  # unrolled
    own_layers: int  # with weights of their own
    aimed_layers: float  # that a token goes through, as the routing aims at
    flops: float  # of a token, forward, as the routing aims at
    full_flops: float  # the same with every token at full depth
    tokens_a_step: int


def facts_of(recipe: RunRecipe) -> Facts:
    """Of a recipe's model; reads its text only where the vocabulary is made of that.

    Raises:
        ValueError: as :func:`train`.
    """
    training, fields = recipe.training, dict(recipe.model)
    with torch.device("meta"):
        if "from_llama" in fields:
            model = from_llama(fields.pop("from_llama"), **fields)
        elif "vocab_size" in fields:
            model = MoRForCausalLM(MoRConfig(**fields))
        else:
            model = build_model(recipe, load_corpus(recipe).tokenizer)
    config, length = model.config, training.length
    shares = aimed_shares(config, length)
    stages = layout(config)
    full = expected_flops(config, length, [1.0] * config.num_recursions)
    head = 0 if config.tie_word_embeddings else model.head_weight().numel()
    return Facts(
        parameters=model.num_parameters(),
        embeddings=model.embed_tokens.weight.numel() + head,
        layers=config.num_hidden_layers,
        own_layers=sum(len(stage.block.layers) for stage in stages),
        aimed_layers=sum(
            len(stage.block.layers) * (sum(shares) if is_routed(stage) else stage.num_recursions)
            for stage in stages
        ),
        flops=expected_flops(config, length).total.item(),
        full_flops=full.total.item(),
        tokens_a_step=training.batch_size * training.gradient_accumulation * length,
    )
