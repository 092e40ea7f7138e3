"""One model in a process of its own: python bench/models_worker.py JSON

The argument is a :class:`Spec`. Prints a JSON line when the model is ready, then one for each line
of input: "step" and "forward" give seconds, "facts" what there is to know about the model.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from mor_ext.models import MoRConfig, MoRForCausalLM
from mor_ext.training import keep_freed_memory, routing_shares

LLAMA = "transformers Llama, SDPA"
VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla": {},
    "MoR-3 expert choice": {"routing": "expert_choice"},
    "MoR-3 expert choice, shared KV": {"routing": "expert_choice", "kv_strategy": "shared"},
    "MoR-3 token choice": {"routing": "token_choice"},
}
MODELS = ["vanilla", LLAMA, *list(VARIANTS)[1:]]


@dataclass(frozen=True)
class Sizes:
    batch: int = 4
    length: int = 512
    vocab_size: int = 2048
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 14
    num_attention_heads: int = 8
    num_key_value_heads: int = 4

    def config(self) -> dict[str, Any]:
        fields = asdict(self)
        del fields["batch"]
        fields["max_position_embeddings"] = fields.pop("length")
        return fields


@dataclass(frozen=True)
class Spec:
    model: str
    sizes: Sizes
    threads: int
    keep_freed_memory: bool

    @staticmethod
    def of(text: str) -> "Spec":
        fields = json.loads(text)
        return Spec(**{**fields, "sizes": Sizes(**fields["sizes"])})


class Work:
    """A training step and a forward pass of a model.

    The step is zero_grad, forward, loss, backward and fused AdamW, whose learning rate is 0: it
    does all its work, and the routing stays what it was, so every step is the same work. The
    forward pass gives all logits, routed by the rule of training, whose share of tokens is known.
    """

    def __init__(self, spec: Spec) -> None:
        torch.manual_seed(0)
        sizes = spec.sizes
        if spec.model == LLAMA:
            self.model, self.options = llama(sizes), {"use_cache": False}
            self.rule: dict[str, Any] = {}
        else:
            self.model, self.options = ours(spec.model, sizes), {}
            self.rule = {"causal": False}
        self.text = torch.randint(sizes.vocab_size, (sizes.batch, sizes.length))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0, fused=True)

    def step(self) -> Any:
        self.model.train()
        self.optimizer.zero_grad()
        output = self.model(input_ids=self.text, labels=self.text, **self.options)
        output.loss.backward()
        self.optimizer.step()
        return output

    @torch.no_grad()
    def forward(self) -> Tensor:
        self.model.eval()
        return self.model(input_ids=self.text, **self.options, **self.rule).logits

    def facts(self) -> dict[str, Any]:
        found = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "step_flops": flops(self.step),
            "forward_flops": flops(self.forward),
        }
        if self.rule:
            found["depth"] = self.step().depth.float().mean().item()
            found["routing_share"] = sum(routing_shares(self.step).values())
        return found


def llama(sizes: Sizes) -> torch.nn.Module:
    config = LlamaConfig(
        **sizes.config(), tie_word_embeddings=True, attn_implementation="sdpa", dtype="float32"
    )
    return LlamaForCausalLM(config)


def ours(name: str, sizes: Sizes) -> torch.nn.Module:
    variant = VARIANTS[name]
    recursions = {"num_recursions": 3} if variant else {}
    return MoRForCausalLM(MoRConfig(**sizes.config(), **recursions, **variant))


# ---- FLOPs ----


def flops(call: Callable[[], Any]) -> int:
    """Of matrix products and attention; of attention those of visible (query, key) pairs alone."""
    aten, mor = torch.ops.aten, torch.ops.mor
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: causal_sdpa,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: causal_sdpa_backward,
        mor.attention: attention,
        mor.attention_bwd: attention_backward,
    }
    for formula in formulas.values():
        formula._get_raw = True  # FlopCounterMode's mark of those that want tensors, not shapes
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        call()
    return counter.get_total_flops()


def causal_sdpa(query: Tensor, *_: Any, **__: Any) -> int:  # [batch, heads, length, D]
    """4 FLOPs a visible pair and element of its head: two products."""
    batch, heads, length, dim = query.shape
    return 4 * batch * heads * dim * length * (length + 1) // 2


def causal_sdpa_backward(grad_out: Tensor, query: Tensor, *_: Any, **__: Any) -> int:
    """10: five products."""
    return causal_sdpa(query) * 5 // 2


def attention(query: Tensor, key: Tensor, value: Tensor, *lengths: Any, **_: Any) -> int:
    cu_seqlens_q, cu_seqlens_k, key_limit, *_sizes = lengths
    if key_limit is None:  # causal, aligned to the last key
        before = cu_seqlens_k.diff() - cu_seqlens_q.diff()
        counts = zip(cu_seqlens_q.diff().tolist(), before.tolist(), strict=True)
        pairs = sum(q * b + q * (q + 1) // 2 for q, b in counts)
    else:
        pairs = int(key_limit.sum())
    return 4 * pairs * query.shape[1] * query.shape[2]


def attention_backward(grad_out: Tensor, grad_lse: Tensor | None, *args: Any, **_: Any) -> int:
    query, key, value, _out, _lse, *lengths = args
    return attention(query, key, value, *lengths) * 5 // 2


# ---- the process ----


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(call: Callable[[], Any]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def main(spec: Spec) -> None:
    torch.set_num_threads(spec.threads)
    if spec.keep_freed_memory:
        keep_freed_memory()
    before = resident()
    work = Work(spec)
    for _ in range(2):
        work.step()
    memory = peak() - before  # of training
    work.forward()
    say(ready=True)
    for line in sys.stdin:
        match line.strip():
            case "step":
                say(**timed(work.step))
            case "forward":
                say(**timed(work.forward))
            case "facts":
                say(memory=memory, **work.facts())


def say(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


if __name__ == "__main__":
    main(Spec.of(sys.argv[1]))
