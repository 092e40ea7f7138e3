"""Types of the C++ module; csrc/engine has the documentation.

Arrays are views of the C++ object's memory, valid until its next call.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Flags = NDArray[np.bool_]

BLOCK_SIZE: int
build_info: dict[str, str]
available_cpu_isas: list[str]
cpu_isa: str

class BlockPool:
    num_blocks: int
    num_free: int
    num_kept: int
    def __init__(self, num_blocks: int) -> None: ...
    def take(self) -> int: ...
    def share(self, block: int) -> None: ...
    def drop(self, block: int) -> None: ...
    def keep(self, block: int) -> None: ...
    def drop_kept(self, block: int) -> None: ...
    def users(self, block: int) -> int: ...

class Copies:
    source: Int32s
    target: Int32s
    def __len__(self) -> int: ...

class Lane:
    entries: int
    pages: int
    blocks: Int32s
    def __init__(self, layers: int) -> None: ...
    def address(self, layer: int, entry: int) -> int: ...
    def blocks_to_append(self, pool: BlockPool, count: int) -> int: ...
    def append(self, pool: BlockPool, count: int, copies: Copies) -> None: ...
    def prefix(self, pool: BlockPool, entries: int) -> Lane: ...
    def keep(self, pool: BlockPool, entries: int) -> None: ...
    def clear(self, pool: BlockPool) -> None: ...

class Entry:
    rows: Int32s  # [n]
    positions: Int32s  # [n]
    ids: Int32s  # [n]

class Pass:
    rows: Int32s  # [k]
    positions: Int32s  # [k]
    depths: Int32s  # [k]
    key_limit: Int32s  # [k]
    depth_rows: list[int]  # [recursions + 1]
    cu_rows: Int32s  # [groups + 1]
    before: Int32s  # [groups]
    after: Int32s  # [groups]
    tables: Int32s  # [layers, groups, pages]
    longest: int
    first_groups: int
    block_copies: Copies
    writes: Int32s  # [layers, k]
    exited_rows: Int32s  # [e]
    exited_positions: Int32s  # [e]
    exited_writes: Int32s  # [layers, e]
    carried: Copies

class Carry:
    blocks: Copies
    entries: Copies

class Sampled:
    ids: NDArray[np.int64]
    rows: Int32s

class Counters:
    steps: int
    preemptions: int
    tokens: int
    shared_tokens: int
    evictions: int

class Scheduler:
    num_running: int
    num_waiting: int
    num_kept: int
    num_slots_free: int
    num_blocks: int
    num_blocks_free: int
    num_blocks_kept: int
    counters: Counters
    def __init__(
        self,
        stages: Sequence[tuple[int, int]],
        kv_strategy: str,
        num_blocks: int,
        max_batch: int,
        token_budget: int,
        depthwise: bool = True,
        share_prefixes: bool = True,
    ) -> None: ...
    def fits(self, tokens: int) -> bool: ...
    def submit(self, id: int, prompt: NDArray[Any], priority: int = 0) -> None: ...
    def cancel(self, id: int) -> None: ...
    def plan(self) -> bool: ...
    def enter(self, stage: int) -> Entry: ...
    def choose(self, keep: Flags | None = None) -> None: ...
    def run(self, stage: int) -> Pass | None: ...
    def advance(self, keep: Flags | None = None) -> Carry: ...
    def finish_step(self) -> Sampled: ...
    def append(self, ids: NDArray[Any], tokens: NDArray[Any]) -> None: ...
    def finish(self, id: int, keep: bool = True) -> None: ...
    def drop_kept(self) -> None: ...
    def depth(self, id: int) -> NDArray[np.uint8]: ...
    def check(self) -> None: ...
