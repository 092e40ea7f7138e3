"""The configuration of a model; every variant is one of these."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

SHARING = ("cycle", "sequence", "middle_cycle", "middle_sequence")
ROUTING = ("none", "expert_choice", "token_choice")
KV_STRATEGY = ("recursion_wise", "shared")
UPDATE = ("output", "delta")
UNUSED = {  # fields that say nothing to a routing
    "none": ("capacity", "router_alpha", "router_loss_coef"),
    "expert_choice": (),
    "token_choice": ("capacity", "update"),
}


@dataclass
class MoRConfig:
    """Names are Hugging Face's where they exist.

    Vanilla is ``num_recursions=1``, recursive adds recursions, MoR adds ``routing``. Fields that
    are None take the default of the router, which is the paper's (Bae et al., arXiv 2507.10524).

    Sharing of L = num_hidden_layers unrolled layers among N = num_recursions:

    * cycle: the block of L / N layers runs N times, layer l has the weights of l mod (L / N).
    * sequence: each of L / N layers runs N times before the next, layer l has those of l // N;
      every such layer is a block with a router of its own.
    * middle_cycle, middle_sequence: the same between a first and a last layer of their own.
    """

    vocab_size: int = 256
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 5  # unrolled depth
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02

    num_recursions: int = 1
    sharing: str = "middle_cycle"
    routing: str = "none"
    kv_strategy: str = "recursion_wise"
    capacity: tuple[float, ...] | None = None  # by depth: (N - r + 1) / N
    router_alpha: float | None = None  # scale of the gate: 0.1 (expert choice), 1 (token choice)
    router_loss_coef: float | None = None  # 0.001 (expert choice), 0.1 (token choice)
    update: str | None = None  # see nn/router.py: "output" (expert choice), "delta" (none)

    def __post_init__(self) -> None:
        self._choices()
        self._sizes()
        n = self.num_recursions
        if self.capacity is not None:
            self.capacity = tuple(self.capacity)  # JSON has lists
            if len(self.capacity) != n or not all(0 < c <= 1 for c in self.capacity):
                raise ValueError(
                    f"capacity must be {n} numbers in (0, 1], one a recursion, got {self.capacity}"
                )

    def _choices(self) -> None:
        names = {"sharing": SHARING, "routing": ROUTING, "kv_strategy": KV_STRATEGY}
        for name, valid in names.items():
            if getattr(self, name) not in valid:
                raise ValueError(
                    f"{name} must be one of {', '.join(valid)}, got {getattr(self, name)!r}"
                )
        if self.update not in (None, *UPDATE):
            raise ValueError(f"update must be one of {', '.join(UPDATE)}, got {self.update!r}")

        for name in UNUSED[self.routing]:
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} must be None for routing {self.routing!r}, got {getattr(self, name)}"
                )

    def _sizes(self) -> None:
        if self.num_recursions < 1:
            raise ValueError(f"num_recursions must be at least 1, got {self.num_recursions}")
        unshared, shared = self.unshared_layers, self.num_hidden_layers - self.unshared_layers
        if shared < 1 or shared % self.num_recursions:
            valid = [unshared + self.num_recursions * i for i in range(1, 4)]
            raise ValueError(
                f"num_hidden_layers must be {', '.join(map(str, valid))}, ... for sharing "
                f"{self.sharing!r} with {self.num_recursions} recursions, "
                f"got {self.num_hidden_layers}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads = "
                f"{self.num_key_value_heads}, got {self.num_attention_heads}"
            )
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.head_dim % 8 or not 0 < self.head_dim <= 256:
            raise ValueError(f"head_dim must be a multiple of 8 up to 256, got {self.head_dim}")

    @property
    def unshared_layers(self) -> int:
        """2 where the first and the last layer have weights of their own, else 0."""
        return 2 if self.sharing.startswith("middle") else 0

    @property
    def shared_layers(self) -> int:
        """Layers of their own weights among those that recursions share."""
        return (self.num_hidden_layers - self.unshared_layers) // self.num_recursions

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> MoRConfig:
        return MoRConfig(**json.loads(Path(path).read_text()))
