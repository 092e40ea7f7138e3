"""From a config to the stages of a model: the sharing rules, and the router of each stage."""

from collections.abc import Iterator
from typing import Any

from mor_ext.models.config import SETTINGS, MoRConfig
from mor_ext.nn import (
    ActionRouter,
    Attention,
    Block,
    ExpertChoiceRouter,
    FixedDepthRouter,
    Layer,
    RandomRouter,
    Recursion,
    Router,
    SwiGLU,
    TokenChoiceRouter,
)


def stages_of(config: MoRConfig) -> Iterator[Recursion]:
    """Which layers form a block, how often each block runs, and who chooses its tokens."""
    numbers = iter(range(config.num_hidden_layers))

    def stage(layers: int, recursions: int, router: Router) -> Recursion:
        block = Block(_layer(next(numbers), config) for _ in range(layers))
        return Recursion(recursions, block, router)

    if config.unshared_layers:
        yield stage(1, 1, Router())
    if config.routing == "mixture_of_depths":
        for number in range(config.shared_layers):
            yield stage(1, 1, _router(config) if number % 2 else Router())
    elif config.sharing.endswith("sequence"):
        for _ in range(config.shared_layers):
            yield stage(1, config.num_recursions, _router(config))
    else:
        yield stage(config.shared_layers, config.num_recursions, _router(config))
    if config.unshared_layers:
        yield stage(1, 1, Router())


def _layer(number: int, config: MoRConfig) -> Layer:
    assert config.num_key_value_heads is not None and config.head_dim is not None
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
    """Routers name their arguments as the config does, without ``router_``."""
    settings: dict[str, Any] = {
        name.removeprefix("router_"): getattr(config, name) for name in SETTINGS[config.routing]
    }
    match config.routing:
        case "expert_choice" | "mixture_of_depths":
            return ExpertChoiceRouter(config.hidden_size, **settings)
        case "token_choice":
            return TokenChoiceRouter(config.hidden_size, config.num_recursions, **settings)
        case "action":
            return ActionRouter(config.hidden_size, config.num_recursions, **settings)
        case "random":
            return RandomRouter(**settings)
        case "fixed_depth":
            return FixedDepthRouter(**settings)
    return Router(**settings)
