"""Every variant unrolled: dense masks, nothing skipped, no op of this package.

Every token goes through every layer; one that is not active keeps the hidden state of before.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from mor_ext.models import MoRForCausalLM


@dataclass
class Group:
    """Layers that one router sends tokens through, again and again."""

    layers: list
    recursions: int
    router: object = None  # None: everybody
    edge: bool = False  # the first or the last layer, with weights of their own
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # K/V by layer


def reference(model: MoRForCausalLM, ids: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """Logits [T, vocab] and depth [T] of one sequence.

    Random draws are made in the order and the shapes of the model's, of a batch of this sequence.
    """
    config = model.config
    hidden = model.embed_tokens.weight[ids]
    depth = torch.zeros(len(ids), dtype=torch.int32)
    for group in groups_of(model):
        routed = group.router is not None
        entry, draw = hidden, None
        active = torch.ones(len(ids), dtype=torch.bool)
        for step in range(group.recursions):
            gate, last = 1.0, None
            if routed:
                if step == 0:
                    draw = choose(config, group.router, hidden, causal)
                active, gate, last = draw(step, hidden, active)
            if step == 0:
                first = active
            x = block(group, step, model, hidden, active, first)
            if routed and config.routing == "token_choice":
                new = gate * x + last * entry  # equation 2
            elif routed and config.router_update == "output":
                new = hidden + gate * x  # equation 1
            elif routed:
                new = hidden + gate * (x - hidden)
            else:
                new = x
            hidden = torch.where(active.unsqueeze(1), new, hidden)
            if not group.edge:
                depth += active
    return norm(model.norm, hidden) @ model.head_weight().T, depth


def groups_of(model: MoRForCausalLM) -> list[Group]:
    config = model.config
    edge = int(config.sharing.startswith("middle"))
    layers = [layer for stage in model.stages for layer in stage.block.layers]
    routers = [stage.router for stage in model.stages]
    middle = layers[edge : len(layers) - edge]
    routers = routers[edge : len(routers) - edge]
    n = config.num_recursions
    if config.routing == "mixture_of_depths":  # every second layer is routed
        groups = [
            Group([layer], 1, router if number % 2 else None)
            for number, (layer, router) in enumerate(zip(middle, routers, strict=True))
        ]
    elif config.sharing.endswith("cycle"):  # (0 1) (0 1) (0 1)
        groups = [Group(middle, n, routers[0])]
    else:  # (0) (0) (0) (1) (1) (1)
        groups = [Group([la], n, r) for la, r in zip(middle, routers, strict=True)]
    if edge:
        first, last = (Group([layer], 1, edge=True) for layer in (layers[0], layers[-1]))
        groups = [first, *groups, last]
    return groups


def choose(config, router, entry, causal):
    """From a step, the hidden state and who was active: who is, gates [T, 1], who is at the end."""
    total = len(entry)
    if config.routing == "none":
        return lambda step, hidden, active: (active, 1.0, None)
    if config.routing == "fixed_depth":
        return lambda step, hidden, active: (active & (step < config.fixed_depth), 1.0, None)
    if config.routing == "token_choice":
        logits = scores(router.scorer, entry)
        softmax = config.router_activation == "softmax"
        g = config.router_alpha * (logits.softmax(1) if softmax else logits.sigmoid())
        choice = (logits + (router.bias if config.balancing == "bias" else 0)).argmax(dim=1)

        def pick(step, hidden, active):
            last = (choice == step).unsqueeze(1)
            gate = g[:, step : step + 1]
            return choice >= step, gate if config.gate_at == "each" else last * gate + ~last, last

        return pick
    if config.routing == "action":
        w1, b1 = router.up.weight, router.up.bias
        w2, b2 = router.down.weight, router.down.bias
        logits = (entry @ w1.T + b1).clamp(min=0) @ w2.T + b2
        if not causal:
            logits = logits - torch.empty_like(logits).exponential_().log()
        action = logits.argmax(dim=1)
        # Straight through: value 1, the gradient of the soft sample's tail sum.
        tail = (logits / config.gumbel_temperature).softmax(1).flip(1).cumsum(1).flip(1)[:, 1:]
        st = tail - tail.detach() + 1 if not causal else torch.ones_like(tail)
        return lambda step, hidden, active: (action > step, st[:, step : step + 1], None)
    if config.routing == "random":
        u = torch.tensor([hashed(p) for p in range(total)]) if causal else torch.rand(total)

        def drawn(step, hidden, active):
            if causal:
                return active & (u < config.capacity[step]), config.router_alpha, None
            return top(config.capacity[step], -u, active), config.router_alpha, None

        return drawn

    activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "identity": lambda x: x}

    def expert(step, hidden, active):
        logits = scores(router.scorers[step], hidden).squeeze(1)
        gate = config.router_alpha * activation[config.router_activation](logits).unsqueeze(1)
        if config.capacity[step] >= (config.capacity[step - 1] if step else 1):
            return active, gate, None
        if causal:
            aux = config.causal_rule == "aux_router"
            foreseen = scores(router.predictors[step], hidden).squeeze(1) if aux else logits
            return active & (torch.sigmoid(foreseen) >= 0.5), gate, None
        return top(config.capacity[step], logits, active), gate, None

    return expert


def scores(scorer, hidden):
    if scorer.up is not None:
        hidden = F.gelu(hidden @ scorer.up.weight.T)
    return hidden @ scorer.weight.T


def top(capacity, score, active):
    k = min(int(active.sum()), max(1, int(capacity * len(score))))
    index = score.masked_fill(~active, -math.inf).topk(k).indices
    return torch.zeros_like(active).index_fill(0, index, True)


def hashed(position: int) -> float:
    x = position + 1
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) % 2**32
    return ((x ^ (x >> 16)) >> 8) / 2**24


def block(group: Group, step, model, hidden, active, first):
    """The layers of a group on all tokens; who sees whose K/V is the KV strategy."""
    strategy = model.config.kv_strategy
    past = torch.ones(len(hidden), len(hidden), dtype=torch.bool).tril()
    visible = (
        past
        & {
            "recursion_wise": active,
            "shared": first,
            "hybrid": first,
            "frozen": torch.ones_like(active),
        }[strategy]
    )
    x = hidden
    for number, layer in enumerate(group.layers):
        new = key_value(layer, model, x)
        if strategy == "frozen":  # those not active: of their own hidden state
            new = blend(active, new, key_value(layer, model, hidden))
        elif step > 0 and strategy != "recursion_wise":
            nobody = torch.zeros_like(active)
            new = blend(active if strategy == "hybrid" else nobody, new, group.kept[number])
        group.kept[number] = new
        x = apply(layer, model, x, visible, new)
    return x


def blend(rows, new, old):
    return tuple(torch.where(rows[:, None, None], a, b) for a, b in zip(new, old, strict=True))


def key_value(layer, model, x):
    """Keys and values [T, Hkv, D] of x [T, hidden], keys rotated."""
    config = model.config
    normed, d = norm(layer.attention_norm, x), config.head_dim
    _, wk, wv = projections(layer, config)
    k, v = ((normed @ w.T).unflatten(1, (-1, d)) for w in (wk, wv))
    return rotary(k, config.rope_parameters["rope_theta"]), v


def projections(layer, config):
    sizes = [config.num_attention_heads] + 2 * [config.num_key_value_heads]
    return layer.attention.qkv_proj.weight.split([n * config.head_dim for n in sizes])


def apply(layer, model, x, visible, kv):
    """A Llama layer on all tokens of a sequence, visible [T, T], kv [T, Hkv, D] each."""
    config = model.config
    d, heads, kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    wq, _, _ = projections(layer, config)
    q = (norm(layer.attention_norm, x) @ wq.T).unflatten(1, (-1, d))
    q, (k, v) = rotary(q, config.rope_parameters["rope_theta"]), kv
    out = []
    for h in range(heads):
        g = h // (heads // kv_heads)
        score = (q[:, h] @ k[:, g].T / math.sqrt(d)).masked_fill(~visible, -math.inf)
        # A row that sees nothing belongs to a token that is not active: its value is not used.
        out.append(score.softmax(dim=1).nan_to_num() @ v[:, g])
    x = x + torch.cat(out, dim=1) @ layer.attention.o_proj.weight.T
    gate, up = (norm(layer.mlp_norm, x) @ layer.mlp.gate_up_proj.weight.T).chunk(2, 1)
    return x + (gate * torch.sigmoid(gate) * up) @ layer.mlp.down_proj.weight.T


def norm(module, x):
    return x / (x.pow(2).mean(dim=1, keepdim=True) + module.eps).sqrt() * module.weight


def rotary(x, theta):
    """Turns the pairs (x[i], x[i + D / 2]) as complex numbers."""
    d = x.shape[2]
    frequency = theta ** -(torch.arange(0, d, 2).double() / d)
    angle = torch.outer(torch.arange(len(x)).double(), frequency).unsqueeze(1)
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.exp(1j * angle)
    return torch.cat([turned.real, turned.imag], dim=-1)
