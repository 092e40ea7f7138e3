"""One causal language model for vanilla, recursive and Mixture-of-Recursions transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mor_ext.models.config import MoRConfig
from mor_ext.nn import (
    Attention,
    Block,
    ExpertChoiceRouter,
    KVStore,
    Layer,
    PackedKV,
    Recursion,
    RMSNorm,
    Rotary,
    Router,
    SwiGLU,
    TokenChoiceRouter,
    Tokens,
)


@dataclass
class MoROutput:
    logits: Tensor  # [..., vocab_size], leading shape of input_ids
    depth: Tensor  # int32, shape of input_ids: applications of shared blocks to each token
    aux_loss: Tensor  # [], the routers' losses, their coefficients included
    nll: Tensor | None = None  # [], mean negative log likelihood of the next token, in nats
    loss: Tensor | None = None  # [], nll + aux_loss


class MoRForCausalLM(nn.Module):
    """Embedding, stages, norm, head. A stage is a :class:`Recursion`; the config lays them out.

    Args of ``forward``:
        input_ids: integers ``[batch, length]``, or packed ``[total]`` with ``lengths``.
        lengths: tokens of each packed sequence.
        labels: shape of input_ids, usually input_ids itself: position t is scored on label t + 1
            of its sequence; -100 is ignored.
        causal: routing by a rule that looks at no later token; None is causal except in training,
            where expert choice takes the top-k of a sequence.
        store: where K/V are kept between calls (``mor_ext.inference``); the sequences then
            continue what it holds, and routing is causal.
    """

    def __init__(self, config: MoRConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(_stages(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal; what enters the residual stream is scaled by the depth, as in GPT-2."""
        std = self.config.initializer_range
        residual = std / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                enters = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual if enters else std)

    def forward(
        self,
        input_ids: Tensor,
        lengths: Sequence[int] | None = None,
        labels: Tensor | None = None,
        causal: bool | None = None,
        store: KVStore | None = None,
    ) -> MoROutput:
        if store is None:
            store = PackedKV(self.config.kv_strategy == "shared", self.rotary)
        tokens = store.enter(self._lengths(input_ids, lengths), input_ids.device)
        causal = not self.training if causal is None else causal

        hidden = self.embed_tokens(input_ids.flatten())  # [total, hidden_size]
        # Every stage counts its applications; the layers that are not shared are no recursions.
        depth = torch.full_like(tokens.positions, -self.config.unshared_layers)
        aux_loss = hidden.new_zeros(())
        for number, stage in enumerate(self.stages):
            hidden, stage_depth, stage_loss = stage(hidden, tokens, store, number, causal)
            depth = depth + stage_depth
            aux_loss = aux_loss + stage_loss
        logits = F.linear(self.norm(hidden), self.head_weight())  # [total, vocab_size]

        output = MoROutput(
            logits.view(*input_ids.shape, self.config.vocab_size),
            depth.view(input_ids.shape),
            aux_loss,
        )
        if labels is not None:
            output.nll = _next_token_loss(logits, labels.flatten(), tokens)
            output.loss = output.nll + aux_loss
        return output

    def head_weight(self) -> Tensor:
        """``[vocab_size, hidden_size]``; tied embeddings are one parameter, so they stay tied."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    def _lengths(self, input_ids: Tensor, lengths: Sequence[int] | None) -> Sequence[int]:
        if lengths is None:
            if input_ids.dim() != 2:
                raise ValueError(
                    f"input_ids must be [batch, length] or come with lengths, "
                    f"got shape {list(input_ids.shape)}"
                )
            lengths = [input_ids.shape[1]] * input_ids.shape[0]
        if sum(lengths) != input_ids.numel():
            raise ValueError(f"lengths must add up to {input_ids.numel()}, got {sum(lengths)}")
        limit = self.config.max_position_embeddings
        if max(lengths, default=0) > limit:
            raise ValueError(f"lengths must be at most {limit}, got {max(lengths)}")
        return lengths

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``model.pt``; a shared or tied weight is stored once."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save(Path(folder) / "config.json")
        torch.save(self.state_dict(), Path(folder) / "model.pt")

    @staticmethod
    def from_pretrained(folder: str | Path) -> MoRForCausalLM:
        model = MoRForCausalLM(MoRConfig.load(Path(folder) / "config.json"))
        state = torch.load(Path(folder) / "model.pt", map_location="cpu", weights_only=True)
        model.load_state_dict(state)
        return model


def _stages(config: MoRConfig) -> list[Recursion]:
    """The sharing rule: which layers form a block, and how often each block runs."""
    sequence = config.sharing.endswith("sequence")
    blocks = [1] * config.shared_layers if sequence else [config.shared_layers]
    plan = [(layers, config.num_recursions, _router(config)) for layers in blocks]
    if config.unshared_layers:
        plan = [(1, 1, Router()), *plan, (1, 1, Router())]
    number = iter(range(config.num_hidden_layers))
    return [
        Recursion(recursions, Block(_layer(next(number), config) for _ in range(layers)), router)
        for layers, recursions, router in plan
    ]


def _layer(number: int, config: MoRConfig) -> Layer:
    attention = Attention(
        number,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    mlp = SwiGLU(config.hidden_size, config.intermediate_size)
    return Layer(attention, mlp, config.hidden_size, config.rms_norm_eps)


def _router(config: MoRConfig) -> Router:
    n = config.num_recursions
    fields = {
        "alpha": config.router_alpha,
        "coef": config.router_loss_coef,
        "update": config.update,
    }
    given: dict[str, Any] = {name: value for name, value in fields.items() if value is not None}
    if config.routing == "expert_choice":
        capacity = config.capacity or tuple((n - r) / n for r in range(n))
        return ExpertChoiceRouter(config.hidden_size, capacity, **given)
    if config.routing == "token_choice":
        return TokenChoiceRouter(config.hidden_size, n, **given)
    return Router(**given)


def _next_token_loss(logits: Tensor, labels: Tensor, tokens: Tokens) -> Tensor:
    """Mean cross entropy of logits ``[total, vocab_size]`` against each token's successor."""
    targets = labels.roll(-1).index_fill(0, tokens.cu_seqlens[1:].long() - 1, -100)
    return F.cross_entropy(logits, targets)
