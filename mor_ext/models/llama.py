"""From a Llama to a model of this package: the same function, or where uptraining starts."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from mor_ext.models.checkpoint import Checkpoint
from mor_ext.models.config import MoRConfig
from mor_ext.models.model import MoRForCausalLM
from mor_ext.nn import Layer, Router

INITS = ("stepwise", "average", "lower", "upper")
FIELDS = (  # that both configs have, with one meaning
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
SUPPORTED = {  # what a Llama may be told beyond that
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
}
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@torch.no_grad()
def from_llama(
    source: str | os.PathLike[str] | LlamaForCausalLM,
    num_recursions: int = 1,
    sharing: str = "middle_cycle",
    init: str = "stepwise",
    dtype: torch.dtype | None = None,
    **config_fields: Any,
) -> MoRForCausalLM:
    """A model with the weights of a Llama, on the CPU and in evaluation mode.

    With one recursion, no routing and the depth of the source it is the same function. Otherwise it
    is where uptraining starts, by the methods of Bae et al., arXiv 2410.20672. With "middle"
    sharings the first and the last layer are the source's. The n layers that recursions share come
    from the m others, which are layers k to k + m - 1 of the source, by ``init``:

    * stepwise: n at equal intervals, the first and the last of the m among them: the i-th is layer
      ``k + i * (m - 1) / (n - 1)``, rounded, a half to the even number; if n is 1 it is layer k.
    * average: each the mean of the layers that it stands for, those of its places in the unrolled
      model. Where that has u shared layers and not m, the one in place i is layer
      ``k + i * (m - 1) / (u - 1)``, rounded.
    * lower: the first n; upper: the last n.

    What routers learn starts as in a new model.

    Args:
        source: a folder with ``config.json`` and ``model.safetensors``, or its shards and
            ``model.safetensors.index.json``, as ``save_pretrained`` writes them; or a model.
        dtype: of the result; None is that of the source's embedding.
        config_fields: of :class:`MoRConfig`. What is not given is the source's, so
            ``num_hidden_layers``, the unrolled depth, is its number of layers.

    Raises:
        ValueError: the source is no Llama, or one with biases, an activation that is not silu, a
            rope that is not the default or quantised weights; a file of it is missing or cut short;
            a tensor is missing, unexpected or of a shape that does not fit; a field is wrong.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if isinstance(source, LlamaForCausalLM):
        llama: LlamaConfig = source.config
        generation: GenerationConfig | None = source.generation_config
        checkpoint = Checkpoint.of_model(source)
    else:
        llama, generation = read_configs(Path(source))
        checkpoint = Checkpoint.of_folder(Path(source))
    check_supported(llama)
    fields = {name: copy.deepcopy(getattr(llama, name)) for name in FIELDS}
    fields |= {"num_recursions": num_recursions, "sharing": sharing} | config_fields
    config = MoRConfig(**fields)
    if config.tie_word_embeddings and not llama.tie_word_embeddings:
        raise ValueError("tie_word_embeddings must be False for a source with a head, got True")
    numbers = layers_to_use(config, llama.num_hidden_layers, init)
    with no_init_weights():
        model = MoRForCausalLM(config)
    layers = [layer for layer in model.modules() if isinstance(layer, Layer)]
    check_names(checkpoint, llama, layers[0])

    dtype = checkpoint.dtype(EMBEDDING) if dtype is None else dtype
    model.to(dtype=dtype)  # type: ignore[call-arg] # transformers wraps nn.Module.to
    checkpoint.copy_mean([EMBEDDING], model.embed_tokens.weight)
    checkpoint.copy_mean([NORM], model.norm.weight)
    if not config.tie_word_embeddings:
        head = EMBEDDING if llama.tie_word_embeddings else HEAD
        checkpoint.copy_mean([head], model.lm_head.weight)
    for layer, sources in zip(layers, numbers, strict=True):
        for name, weight in llama_weights(layer).items():
            checkpoint.copy_mean([f"model.layers.{source}.{name}" for source in sources], weight)
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.apply(model._init_weights)
    if generation is not None:
        model.generation_config = copy.deepcopy(generation)
    return model.eval()


def llama_weights(layer: Layer) -> dict[str, Tensor]:
    """By their names in a Llama layer: the weights of a layer, and views where ours are joined."""
    attention, mlp = layer.attention, layer.mlp
    query, key, value = attention.qkv_proj.weight.split(attention.sizes)
    gate, up = mlp.gate_up_proj.weight.chunk(2)
    return {
        "input_layernorm.weight": layer.attention_norm.weight,
        "self_attn.q_proj.weight": query,
        "self_attn.k_proj.weight": key,
        "self_attn.v_proj.weight": value,
        "self_attn.o_proj.weight": attention.o_proj.weight,
        "post_attention_layernorm.weight": layer.mlp_norm.weight,
        "mlp.gate_proj.weight": gate,
        "mlp.up_proj.weight": up,
        "mlp.down_proj.weight": mlp.down_proj.weight,
    }


def layers_to_use(config: MoRConfig, depth: int, init: str) -> list[list[int]]:
    """The numbers of the source's layers, of ``depth``, that each layer with own weights takes."""
    edge, own = config.unshared_layers // 2, config.shared_layers
    middle = range(edge, depth - edge)
    if own > len(middle):
        limit = config.unshared_layers + config.num_recursions * len(middle)
        raise ValueError(
            f"num_hidden_layers must be at most {limit} for sharing {config.sharing!r} of a source "
            f"of {depth} layers with {config.num_recursions} recursions, "
            f"got {config.num_hidden_layers}"
        )
    match init:
        case "stepwise":
            chosen = [[number] for number in spaced(middle, own)]
        case "lower":
            chosen = [[number] for number in middle[:own]]
        case "upper":
            chosen = [[number] for number in middle[-own:]]
        case _:
            n = config.num_recursions
            unrolled = spaced(middle, own * n)
            if config.sharing.endswith("sequence"):  # (0) (0) (1) (1)
                chosen = [unrolled[i * n : (i + 1) * n] for i in range(own)]
            else:  # (0 1) (0 1)
                chosen = [unrolled[i::own] for i in range(own)]
    return [[0], *chosen, [depth - 1]] if edge else chosen


def spaced(numbers: range, count: int) -> list[int]:
    """So many of them, at equal intervals from the first to the last."""
    first, gaps = numbers[0], max(1, count - 1)
    return [round(first + i * (len(numbers) - 1) / gaps) for i in range(count)]


def check_names(checkpoint: Checkpoint, llama: LlamaConfig, like: Layer) -> None:
    """The checkpoint has the tensors of a Llama, whose layers have the names of ``like``'s weights.

    Tied embeddings may be there twice, and old checkpoints have their rotary's frequencies.
    """
    prefixes = [f"model.layers.{number}." for number in range(llama.num_hidden_layers)]
    needed = [EMBEDDING, NORM, *(p + name for p in prefixes for name in llama_weights(like))]
    ignored = [p + "self_attn.rotary_emb.inv_freq" for p in prefixes]
    (ignored if llama.tie_word_embeddings else needed).append(HEAD)
    checkpoint.check_names(needed, ignored)


def read_configs(folder: Path) -> tuple[LlamaConfig, GenerationConfig | None]:
    if not (folder / "config.json").is_file():
        raise ValueError(f"source must be a folder with a config.json, got {str(folder)!r}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:  # not JSON, or of an unknown type
        raise ValueError(
            f"{folder / 'config.json'} must be that of a Llama, got {error}"
        ) from error
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"source must be a Llama, got a model of type {config.model_type!r}")
    if not (folder / "generation_config.json").is_file():
        return config, None
    return config, GenerationConfig.from_pretrained(folder, local_files_only=True)


def check_supported(llama: LlamaConfig) -> None:
    for name, supported in SUPPORTED.items():
        value = getattr(llama, name, None)
        if value not in supported:
            raise ValueError(f"{name} of the source must be {supported[0]!r}, got {value!r}")
    rope_type = (llama.rope_parameters or {}).get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f"rope_type of the source must be 'default', got {rope_type!r}")
