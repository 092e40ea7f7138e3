"""Tasks by EleutherAI's lm-evaluation-harness, on local files or by its own command line.

:func:`run` needs no network: multiple choice and last-word tasks in JSON Lines. All tasks that the
harness knows are there by its own command, started where transformers knows our models::

    python -m mor_ext.evaluation.harness --model hf --model_args pretrained=DIR,backend=causal \\
        --tasks arc_easy,piqa,lambada_openai --device cpu
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from mor_ext.evaluation.checkpoint import default_device, readable

try:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"tasks need {error.name}: pip install 'mor_ext[eval]'") from error

# The fields of a line say what kind of task it is from. Prompts are those of the harness's own
# arc_easy, piqa and lambada_openai; a query ends with its line.
KINDS: dict[tuple[str, ...], dict[str, Any]] = {
    ("query", "choices", "gold"): {
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}Answer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
    },
    ("context", "continuation"): {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{' ' + continuation}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
}


def run(
    model_dir: str | Path,
    tasks: Sequence[str],
    data: str | Path,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
) -> dict[str, dict[str, float]]:
    """Scores a saved model and its tokenizer on local tasks, zero-shot, by the causal rule.

    Task ``name`` is the file ``name.jsonl``, or else ``name_*.jsonl``, in the folder ``data``. Its
    lines have ``query``, ``choices`` and ``gold`` (the number of the right choice, from 0), or
    ``context`` and ``continuation`` (a word).

    Args:
        model_dir: what ``save_pretrained`` of a model and of its tokenizer wrote; any causal model
            of transformers.
        limit: items of each task, the first ones; None is all.
        device: None is the first GPU if there is one.

    Returns:
        For each task its metrics, with ``_stderr`` the standard error of each, and ``items``.
        ``acc``: the choice of the highest probability is right, or the continuation is what greedy
        decoding gives; ``acc_norm``: the same of log probability divided by characters;
        ``perplexity``: exp of the mean negative log probability of a continuation.

    Raises:
        ValueError: no such task, lines of another form, no model, one without a causal rule, or a
            continuation that is longer than the model's context.
    """
    loaded = {name: _task(name, Path(data)) for name in tasks}
    results = evaluate(
        _load(model_dir, batch_size, device), {"tasks": loaded}, limit=limit, bootstrap_iters=0
    )
    return {name: _summary(results, name) for name in loaded}


def _task(name: str, folder: Path) -> ConfigurableTask:
    files = [folder / f"{name}.jsonl"]
    if not files[0].exists():
        files = sorted(folder.glob(f"{name}_*.jsonl"))
    if len(files) != 1:
        there = ", ".join(sorted(path.stem for path in folder.glob("*.jsonl"))) or "none"
        raise ValueError(f"tasks must be of the files in {folder} ({there}), got {name}")
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(files[0].resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
    }
    return ConfigurableTask(config=config | _kind(files[0]))


def _kind(path: Path) -> dict[str, Any]:
    """Of the file's lines, all of which are looked at."""
    kind = None
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            fields = set(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} must be JSON Lines, got {error} in line {number}") from error
        kind = kind or next((kind for kind in KINDS if fields >= set(kind)), None)
        if kind is None or not fields >= set(kind):
            forms = " or ".join(", ".join(form) for form in KINDS)
            raise ValueError(f"{path} must have {forms}, got {sorted(fields)} in line {number}")
    if kind is None:
        raise ValueError(f"{path} must have lines, got none")
    return KINDS[kind]


class _Model(HFLM):
    """The harness's model of transformers; says what is wrong where that would assert."""

    def _loglikelihood_tokens(self, requests: list[Any], *args: Any, **kwargs: Any) -> Any:
        longest = max(len(continuation) for _, _, continuation in requests)
        if longest > self.max_length:
            raise ValueError(
                "continuations of a task must be at most max_position_embeddings = "
                f"{self.max_length} tokens, got {longest}"
            )
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


def _load(model_dir: str | Path, batch_size: int, device: str | None) -> HFLM:
    device = device or default_device()
    with readable(model_dir):
        model = _Model(str(model_dir), backend="causal", batch_size=batch_size, device=device)
    if not getattr(model.model, "causal", True):  # what follows a token would change its score
        raise ValueError(f"model must have a causal rule for tasks, got {model_dir} without")
    return model


def _summary(results: Any, task: str) -> dict[str, float]:
    summary: dict[str, float] = {}
    samples = results["samples"][task]
    for metric in samples[0]["metrics"]:
        value = results["results"][task][f"{metric},none"]
        each = [float(sample[metric]) for sample in samples]
        error = stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        if metric == "perplexity":  # exp(-mean), so by its derivative
            error *= value
        summary |= {metric: float(value), f"{metric}_stderr": error}
    return summary | {"items": len(samples)}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
