"""The configuration of a model; every variant is one of these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PreTrainedConfig

CHOICES = {
    "sharing": ("cycle", "sequence", "middle_cycle", "middle_sequence"),
    "routing": (
        "none",
        "expert_choice",
        "token_choice",
        "action",
        "mixture_of_depths",
        "random",
        "fixed_depth",
    ),
    "kv_strategy": ("recursion_wise", "shared", "hybrid", "frozen"),
    "router_kind": ("linear", "mlp", "wide_mlp"),
    "router_activation": ("sigmoid", "tanh", "identity", "softmax"),
    "causal_rule": ("aux_loss", "aux_router", "none"),
    "balancing": ("loss", "bias"),
    "gate_at": ("each", "last"),
    "router_update": ("output", "delta"),
}
ACTIVATIONS = {  # those of a routing, where it has any
    "expert_choice": ("sigmoid", "tanh", "identity"),
    "mixture_of_depths": ("sigmoid", "tanh", "identity"),
    "token_choice": ("softmax", "sigmoid"),
}
# What a routing can be told, and its defaults: those of the papers (see mor_ext/nn/routers). The
# capacity of None is (N - r + 1) / N at depth r of N.
EXPERT_CHOICE: dict[str, Any] = {
    "capacity": None,
    "router_kind": "linear",
    "router_activation": "sigmoid",
    "router_alpha": 0.1,
    "causal_rule": "aux_loss",
    "router_loss_coef": 0.001,
    "router_z_loss_coef": 0.0,
    "router_update": "output",
    "thresholds": None,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"router_update": "delta"},
    "fixed_depth": {"fixed_depth": None, "router_update": "delta"},
    "expert_choice": EXPERT_CHOICE,
    "mixture_of_depths": EXPERT_CHOICE
    | {
        "capacity": 0.125,
        "router_activation": "identity",
        "router_alpha": 1.0,
        "router_update": "delta",
    },
    "random": {"capacity": None, "router_alpha": 0.1, "router_update": "output"},
    "token_choice": {
        "router_kind": "linear",
        "router_activation": "softmax",
        "router_alpha": 1.0,
        "balancing": "loss",
        "bias_update_rate": 0.001,
        "router_loss_coef": 0.1,
        "router_z_loss_coef": 0.0,
        "gate_at": "each",
    },
    "action": {"router_loss_coef": 0.1, "gumbel_temperature": 1.0},
}
ROUTER_FIELDS = sorted({name for settings in SETTINGS.values() for name in settings})


class MoRConfig(PreTrainedConfig):
    """Names are Hugging Face's where they exist.

    Vanilla is ``num_recursions=1``, recursive adds recursions, MoR adds ``routing``. Fields of the
    router that are None take the routing's default, which is its paper's (Bae et al., arXiv
    2507.10524, for expert and token choice); one that the routing does not have is an error.

    Sharing of L = num_hidden_layers unrolled layers among N = num_recursions:

    * cycle: the block of L / N layers runs N times, layer l has the weights of l mod (L / N).
    * sequence: each of L / N layers runs N times before the next, layer l has those of l // N;
      every such layer is a block with a router of its own.
    * middle_cycle, middle_sequence: the same between a first and a last layer of their own.

    Routings, a class each in ``mor_ext/nn/routers``:

    * none: every token goes to the full depth; fixed_depth: to ``fixed_depth`` of the recursions.
    * expert_choice, token_choice: Mixture-of-Recursions.
    * random: the capacities of expert choice, tokens drawn at random.
    * action: a block is skipped, applied, or applied again. With sharing "sequence" and
      num_recursions 2 every layer has such a router (the skip / forward / recurse router); then
      num_hidden_layers is twice the number of layers.
    * mixture_of_depths: no recursion; of the layers that are shared otherwise (all, or those in the
      middle) every second is routed by expert choice, 12.5 % of the tokens.
    """

    model_type = "mor"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5  # unrolled depth
    num_attention_heads: int = 4
    num_key_value_heads: int | None = 2  # None: as many as attention heads
    head_dim: int | None = None  # None: hidden_size // num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_parameters: dict[str, Any] | None = None  # None: theta 10000
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    num_recursions: int = 1
    sharing: str = "middle_cycle"
    routing: str = "none"
    kv_strategy: str | None = None  # recursion_wise; for routing "action" frozen

    capacity: tuple[float, ...] | list[float] | float | None = None  # by depth, or of all depths
    fixed_depth: int | None = None
    router_kind: str | None = None
    router_activation: str | None = None
    router_alpha: float | None = None  # scale of the gate
    causal_rule: str | None = None  # what learns to foresee the top-k; see ExpertChoiceRouter
    router_loss_coef: float | None = None  # of the auxiliary, balance or depth loss
    router_z_loss_coef: float | None = None
    balancing: str | None = None
    bias_update_rate: float | None = None
    gate_at: str | None = None
    router_update: str | None = None  # see nn/routers/router.py
    # By depth, the least logit that goes on in inference: see ExpertChoiceRouter, mor calibrate.
    thresholds: tuple[float | None, ...] | list[float | None] | None = None
    gumbel_temperature: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rope_parameters is None and "rope_theta" not in kwargs:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        unknown = [name for name in kwargs if not _known_to_transformers(name)]
        if unknown:
            own = type(self).__annotations__
            valid = [field.name for field in dataclasses.fields(self) if field.name in own]
            raise ValueError(
                f"{unknown[0]} must be a field of MoRConfig ({', '.join(valid)}), "
                f"got {kwargs[unknown[0]]!r}"
            )
        if self.kv_strategy is None:
            self.kv_strategy = "frozen" if self.routing == "action" else "recursion_wise"
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_choices()
        self._check_sizes()
        self._settle_router()
        super().__post_init__(**kwargs)
        self._check_rope()

    def _check_choices(self) -> None:
        for name, valid in CHOICES.items():
            value = getattr(self, name)
            if value not in (*valid, None):
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_recursions",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unshared, shared = self.unshared_layers, self.num_hidden_layers - self.unshared_layers
        if shared < 1 or shared % self.num_recursions:
            valid = [unshared + self.num_recursions * i for i in range(1, 4)]
            raise ValueError(
                f"num_hidden_layers must be {', '.join(map(str, valid))}, ... for sharing "
                f"{self.sharing!r} with {self.num_recursions} recursions, "
                f"got {self.num_hidden_layers}"
            )
        heads = self.num_key_value_heads
        assert heads is not None and self.head_dim is not None
        if heads < 1 or self.num_attention_heads % heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads = "
                f"{heads}, got {self.num_attention_heads}"
            )
        if self.head_dim % 8 or not 0 < self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {self.head_dim}")
        if self.routing == "mixture_of_depths" and self.num_recursions != 1:
            raise ValueError(
                "num_recursions must be 1 for routing 'mixture_of_depths', "
                f"got {self.num_recursions}"
            )

    def _settle_router(self) -> None:
        """Fills in the routing's defaults, so that a saved config says what was used."""
        settings = SETTINGS[self.routing]
        for name in ROUTER_FIELDS:
            value = getattr(self, name)
            if name not in settings and value is not None:
                raise ValueError(f"{name} must be None for routing {self.routing!r}, got {value}")
            if value is None and name in settings:
                setattr(self, name, settings[name])
        activations = ACTIVATIONS.get(self.routing, (None,))
        if self.router_activation not in activations:
            raise ValueError(
                f"router_activation must be one of {', '.join(map(str, activations))} for routing "
                f"{self.routing!r}, got {self.router_activation!r}"
            )
        n = self.num_recursions
        if self.routing == "fixed_depth" and not 1 <= (self.fixed_depth or 0) <= n:
            raise ValueError(f"fixed_depth must be from 1 to {n}, got {self.fixed_depth}")
        if "capacity" in settings:
            self._settle_capacity()
        if self.thresholds is not None:
            self.set_thresholds(self.thresholds)

    def _settle_capacity(self) -> None:
        n, capacity = self.num_recursions, self.capacity
        if capacity is None:
            capacity = tuple((n - r) / n for r in range(n))
        elif isinstance(capacity, (int, float)):
            capacity = (float(capacity),) * n
        self.capacity = tuple(capacity)  # JSON has lists
        if len(self.capacity) != n or not all(0 < c <= 1 for c in self.capacity):
            raise ValueError(
                f"capacity must be {n} numbers in (0, 1], one a recursion, got {self.capacity}"
            )

    def set_thresholds(self, thresholds: Sequence[float | None]) -> None:
        """Raises ValueError if the routing has none, or these do not fit."""
        if "thresholds" not in SETTINGS[self.routing]:
            raise ValueError(
                f"thresholds must be None for routing {self.routing!r}, got {thresholds}"
            )
        numbers = [t for t in thresholds if t is not None]
        if len(thresholds) != self.num_recursions or not all(map(math.isfinite, numbers)):
            raise ValueError(
                f"thresholds must be {self.num_recursions} finite numbers or None, one a "
                f"recursion, got {thresholds}"
            )
        self.thresholds = tuple(thresholds)  # JSON has lists

    def _check_rope(self) -> None:
        rope = self.rope_parameters
        if not rope or rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
            raise ValueError(f"rope_parameters must be of rope_type 'default', got {rope}")

    @property
    def unshared_layers(self) -> int:
        """2 where the first and the last layer have weights of their own, else 0."""
        return 2 if self.sharing.startswith("middle") else 0

    @property
    def shared_layers(self) -> int:
        """Layers of their own weights among those that recursions share."""
        return (self.num_hidden_layers - self.unshared_layers) // self.num_recursions


def _known_to_transformers(name: str) -> bool:
    """What ``from_pretrained`` and saved configs hand over beside the fields."""
    return name.startswith("_") or name in {
        "attn_implementation",
        "dtype",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "transformers_version",
        "use_cache",  # the Trainer sets it
    }
