"""What test_distributed.py runs in every process: tiny trainings, by DDP or FSDP2.

torchrun --nproc-per-node 2 two_processes.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import torch
from trainers import QUIET, logged, tiny, trainer_of, windows
from transformers.utils.logging import disable_progress_bar

STEPS, SAVED = 4, 2
CASES = {
    "expert_choice": ("expert_choice", {"router_loss_coef": 0.5}),
    "token_choice": ("token_choice", {"balancing": "bias", "bias_update_rate": 0.3}),
    # K/V go from layer to layer beside their outputs.
    "frozen": ("expert_choice", {"kv_strategy": "frozen", "tie_word_embeddings": False}),
    "vanilla": ("none", {}),
}


def run(case: str, output: Path, processes: int, sharded: bool, resume: bool = False) -> dict:
    """Numbers of each step and of an evaluation; batches are the same for any processes."""
    routing, fields = CASES[case]
    trainer = trainer_of(
        tiny(routing, **fields).double(),  # no rounding that would flip a choice
        output,
        windows(32),
        windows(7, seed=1),  # not a multiple of the batch
        steps=STEPS,
        sharded=sharded,
        others=QUIET | {"save_strategy": "steps"},
        save_every=SAVED,
        batch_size=4 // processes,
        gradient_accumulation=2,
    )
    trainer.train(resume_from_checkpoint=str(output / f"checkpoint-{SAVED}") if resume else None)
    metrics = trainer.evaluate()
    names = ("loss", "grad_norm", "aux_loss", "bits_per_byte", "effective_depth", "load_2")
    result = {name: logged(trainer, name) for name in names}
    names = ("nll", "bits_per_byte", "effective_depth", "agreement", "dead_tokens", "load_2")
    result["eval"] = {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}
    bias = getattr(trainer.model.stages[1].router, "bias", torch.empty(0))
    result["bias"] = bias.tolist()
    return result


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    disable_progress_bar()
    results = {}
    for case in CASES:
        for way in ("ddp", "fsdp"):
            output = folder / f"{case}_{way}"
            results[f"{case} {way}"] = run(case, output, 2, way == "fsdp")
    output = folder / "token_choice_fsdp"
    results["resumed"] = run("token_choice", output, 2, sharded=True, resume=True)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
