"""One causal language model for every variant: vanilla, recursive, Mixture-of-Recursions, kin."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.utils import ModelOutput

from mor_ext import ops
from mor_ext.inference.cache import PagedKV
from mor_ext.models.config import MoRConfig
from mor_ext.models.layout import stages_of
from mor_ext.nn import (
    Attention,
    ExpertChoiceRouter,
    PackedKV,
    Recursion,
    RMSNorm,
    Rotary,
    SwiGLU,
    Tokens,
    linear_cross_entropy,
)
from mor_ext.nn.routers.router import Scorer


@dataclass
class MoROutput(ModelOutput):
    loss: Tensor | None = None  # [], nll + aux_loss
    logits: Tensor | None = None  # [*input_ids.shape, vocab_size]; None in training with labels
    cache: PagedKV | None = None
    nll: Tensor | None = None  # [], mean negative log likelihood of the next token, in nats
    aux_loss: Tensor | None = None  # [], the routers' losses, their coefficients included
    depth: Tensor | None = None  # int32, shape of input_ids: passes through shared blocks
    layers: Tensor | None = None  # int32, shape of input_ids: layers a token went through
    stage_depth: Tensor | None = None  # int32 [*input_ids.shape, stages]: passes through each


class MoRForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, stages, norm, head. A stage is a :class:`mor_ext.nn.Recursion`.

    Batches are packed inside: padding takes no part in anything, routing and attention included.
    """

    config: MoRConfig
    config_class = MoRConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        assert config.head_dim is not None and config.rope_parameters is not None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stages = nn.ModuleList(stages_of(config))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        theta = config.rope_parameters["rope_theta"]
        self.rotary = Rotary(config.head_dim, config.max_position_embeddings, theta)
        self.causal = all(stage.router.causal for stage in self.recursions())
        if not self.causal:
            warnings.warn(
                "this model has no causal rule (causal_rule 'none'): evaluation looks at whole "
                "sequences, and it cannot generate",
                stacklevel=2,
            )
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> MoRForCausalLM:
        """As in transformers, but a file that is cut short is a ValueError that says where."""
        folder = pretrained_model_name_or_path
        try:
            return super().from_pretrained(folder, *model_args, **kwargs)
        except SafetensorError as error:
            raise ValueError(f"{folder} must hold whole safetensors files, got {error}") from error

    def _init_weights(self, module: nn.Module) -> None:
        """Normal; what enters the residual stream is scaled by the depth, as in GPT-2."""
        std = self.config.initializer_range
        residual = std / math.sqrt(2 * self.config.num_hidden_layers)
        match module:
            case Attention():
                init.normal_(module.o_proj.weight, std=residual)
            case SwiGLU():
                init.normal_(module.down_proj.weight, std=residual)
            case RMSNorm():
                init.ones_(module.weight)
            case Scorer() | nn.Embedding():
                init.normal_(module.weight, std=std)
            case nn.Linear():
                init.normal_(module.weight, std=std)
                if module.bias is not None:
                    init.zeros_(module.bias)
            case Rotary():
                module.tabulate()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        causal: bool | None = None,
        cache: PagedKV | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
    ) -> MoROutput | tuple[Any, ...]:
        """Positions are counted over the tokens that are not padding.

        Args:
            input_ids: integers ``[batch, length]``, or packed ``[total]`` with ``lengths``.
            attention_mask: ``[batch, length]``, or longer if tokens came before; 0 is padding.
            labels: shape of input_ids, usually input_ids itself: position t is scored on label
                t + 1 of its sequence; -100 is ignored.
            lengths: tokens of each packed sequence.
            causal: routing by a rule that looks at no later token; None is causal except in
                training, where some routers look at whole sequences.
            cache: the sequences go on from what it holds, and routing is causal.
            use_cache: makes a cache and returns it.
            inputs_embeds: ``[*shape of input_ids, hidden_size]`` instead of input_ids.
            logits_to_keep: logits of so many last positions only; 0 is all.
            num_items_in_batch: what the sum of losses is divided by: the number of labels of an
                optimizer step, if it has several batches. The routers' losses count by the share
                of those labels that this batch has.
            return_dict: False returns a tuple.

        Raises:
            ValueError: shapes that do not fit, too long a sequence, or a model without a causal
                rule that is to use one.
        """
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        shape = embeds.shape[:-1]
        packing = Packing.of(shape, attention_mask, lengths)
        if use_cache and cache is None:
            cache = PagedKV(self, len(packing.lengths))
        if causal is None:
            causal = (self.causal and not self.training) or cache is not None
        if causal and not self.causal:
            raise ValueError("causal must be False for a model without a causal rule, got True")
        assert self.config.kv_strategy is not None
        store = PackedKV(self.config.kv_strategy, self.rotary) if cache is None else cache
        tokens = store.enter(packing.lengths, embeds.device)
        self._check_length(tokens if cache is None else cache.length)

        hidden = packing.pack(embeds)  # [total, hidden_size]
        depths = []
        layers = torch.zeros_like(tokens.positions)
        aux_loss = hidden.new_zeros(())
        for number, stage in enumerate(self.recursions()):
            passed = stage(hidden, tokens, store, number, causal)
            hidden = passed.hidden
            depths.append(passed.depth)
            layers = layers + len(stage.block.layers) * passed.depth
            aux_loss = aux_loss + passed.loss
        hidden = self.norm(hidden)

        output = MoROutput(aux_loss=aux_loss, cache=cache)
        if labels is not None:
            self._score(output, hidden, packing.pack(labels), tokens, num_items_in_batch)
        if labels is None or not self.training:
            kept = packing.keep(hidden, logits_to_keep)
            output.logits = F.linear(kept, self.head_weight())
        stage_depth = torch.stack(depths, dim=-1)  # [total, stages]
        # Every stage counts its applications; the layers that are not shared are no recursions.
        depth = stage_depth.sum(-1, dtype=torch.int32) - self.config.unshared_layers
        output.depth = packing.unpack(depth)
        output.stage_depth = packing.unpack(stage_depth)
        output.layers = packing.unpack(layers)
        return output.to_tuple() if return_dict is False else output

    def recursions(self) -> Iterator[Recursion]:
        """The stages, typed."""
        for stage in self.stages:
            assert isinstance(stage, Recursion)
            yield stage

    def head_weight(self) -> Tensor:
        """``[vocab_size, hidden_size]``; tied embeddings are one parameter, so they stay tied."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    def update_routers(self) -> None:
        """To be called after every optimizer step: what routers learn without a gradient."""
        for stage in self.recursions():
            stage.router.after_step()

    def set_thresholds(self, thresholds: Sequence[float | None]) -> None:
        """Other thresholds of the causal rule, by depth (see :class:`ExpertChoiceRouter`).

        Raises:
            ValueError: the routing has none, or these do not fit.
        """
        self.config.set_thresholds(thresholds)
        for stage in self.recursions():
            if isinstance(stage.router, ExpertChoiceRouter):
                assert self.config.thresholds is not None
                stage.router.thresholds = tuple(self.config.thresholds)

    def _score(
        self,
        output: MoROutput,
        hidden: Tensor,
        labels: Tensor,
        tokens: Tokens,
        num_items: Tensor | int | None,
    ) -> None:
        """nll and loss from normed hidden ``[total, hidden_size]`` and labels ``[total]``."""
        assert output.aux_loss is not None
        targets = labels.roll(-1).index_fill(0, tokens.cu_seqlens[1:].long() - 1, -100)
        total = linear_cross_entropy(hidden, self.head_weight(), targets, num_items=1)
        count = (targets != -100).sum()
        output.nll = total / count.clamp(min=1)
        if num_items is None:
            output.loss = output.nll + output.aux_loss
        else:
            output.loss = (total + count * output.aux_loss) / num_items

    def _check_length(self, length: Tokens | int) -> None:
        limit = self.config.max_position_embeddings
        longest = length if isinstance(length, int) else length.max_seqlen
        if longest > limit:
            raise ValueError(f"lengths must be at most {limit}, got {longest}")

    # ---- generate() ----

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # forward makes a PagedKV


@dataclass
class Packing:
    """Where the tokens of a batch ``[*shape]`` stand in a packed tensor ``[total, ...]``."""

    shape: torch.Size
    lengths: Sequence[int]
    index: Tensor | None = None  # int64 [total], flat positions that hold tokens; None is all

    @staticmethod
    def of(shape: torch.Size, mask: Tensor | None, lengths: Sequence[int] | None) -> Packing:
        if lengths is None:
            if len(shape) != 2:
                raise ValueError(
                    "input_ids must be [batch, length] or come with lengths, "
                    f"got shape {list(shape)}"
                )
            if mask is not None:
                return Packing.masked(shape, mask)
            lengths = [shape[1]] * shape[0]
        if sum(lengths) != shape.numel():
            raise ValueError(f"lengths must add up to {shape.numel()}, got {sum(lengths)}")
        return Packing(shape, lengths)

    @staticmethod
    def masked(shape: torch.Size, mask: Tensor) -> Packing:
        if mask.dim() != 2 or mask.shape[0] != shape[0] or mask.shape[1] < shape[1]:
            raise ValueError(
                f"attention_mask must be [batch, length] of {list(shape)}, or longer, "
                f"got shape {list(mask.shape)}"
            )
        mask = mask[:, mask.shape[1] - shape[1] :] != 0
        lengths = mask.sum(dim=1).tolist()
        if sum(lengths) == shape.numel():
            return Packing(shape, lengths)
        return Packing(shape, lengths, mask.flatten().nonzero().squeeze(1))

    def pack(self, x: Tensor) -> Tensor:  # [*shape, ...] to [total, ...]
        x = x.reshape(self.shape.numel(), *x.shape[len(self.shape) :])
        return x if self.index is None else x[self.index]

    def unpack(self, x: Tensor) -> Tensor:  # [total, ...] to [*shape, ...], 0 where padding is
        if self.index is not None:
            x = x.new_zeros(self.shape.numel(), *x.shape[1:]).index_copy(0, self.index, x)
        return x.view(*self.shape, *x.shape[1:])

    def keep(self, x: Tensor, columns: int) -> Tensor:
        """``[batch, columns, ...]`` of x ``[total, ...]``: the last of ``[*shape]``; 0 is all."""
        if columns == 0 or len(self.shape) != 2:
            return self.unpack(x)
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device) + 1
        index = self.unpack(rows)[:, -columns:] - 1  # -1 where padding is
        return ops.gather_tokens(x, index.flatten()).view(*index.shape, *x.shape[1:])
