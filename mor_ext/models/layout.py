"""From a config to the stages of a model: the sharing rules, and the router of each stage."""

from collections.abc import Iterator

from mor_ext.models.config import MoRConfig
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
    c = config
    match c.routing:
        case "expert_choice" | "mixture_of_depths":
            return ExpertChoiceRouter(
                c.hidden_size,
                c.capacity,
                c.router_kind,
                c.router_activation,
                c.router_alpha,
                c.causal_rule,
                c.router_loss_coef,
                c.router_z_loss_coef,
                c.update,
            )
        case "token_choice":
            return TokenChoiceRouter(
                c.hidden_size,
                c.num_recursions,
                c.router_kind,
                c.router_activation,
                c.router_alpha,
                c.balancing,
                c.router_loss_coef,
                c.bias_update_rate,
                c.gate_at,
                c.router_z_loss_coef,
            )
        case "action":
            return ActionRouter(
                c.hidden_size, c.num_recursions, c.router_loss_coef, c.gumbel_temperature
            )
        case "random":
            return RandomRouter(c.capacity, c.router_alpha, c.update)
        case "fixed_depth":
            return FixedDepthRouter(c.fixed_depth, c.update)
    return Router(c.update)
