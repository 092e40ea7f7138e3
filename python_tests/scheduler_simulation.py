"""A model of numbers for the scheduler: it checks who sees what, at rows of every pass, through the
arrays that Python gets. csrc/engine/simulation does so for many more steps, without those.

A token's depth in a stage is a hash of itself and its position, the next token one of the sequence.
The K/V of a token are a number that says where they were made: ``1000 * position + depth`` by the
block, 500 more where the token exited.

The upper bits of a token tell its owner: a sequence, or a prefix that several begin with.
"""

import numpy as np

from mor_ext._engine import BLOCK_SIZE, Pass, Scheduler

EXIT = 500


def hashed(*values: int) -> int:
    x = 0
    for value in values:
        x = (x * 1_000_003 + value + 1) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x >> 8


class Simulation:
    """Steps a scheduler; ``outputs`` has the tokens of every sequence that has finished."""

    def __init__(
        self, stages: list[tuple[int, int]], strategy: str, num_blocks: int, **limits
    ) -> None:
        self.stages, self.strategy = stages, strategy
        self.depthwise = limits.get("depthwise", True)
        self.scheduler = Scheduler(stages, strategy, num_blocks, **limits)
        self.memory = np.full(num_blocks * BLOCK_SIZE, -1)
        self.slots = [(0, 0)] * limits["token_budget"]  # (sequence, position)
        self.tokens: dict[int, list[int]] = {}
        self.wanted: dict[int, int] = {}  # tokens in the end
        self.outputs: dict[int, list[int]] = {}
        self.started: list[int] = []  # in the order of their first token
        self.block_rows = 0  # rows of passes, times layers

    def prefix(self, owner: int, length: int) -> list[int]:
        """Tokens that prompts can begin with."""
        self.tokens[owner] = prompt_of(owner, length)
        return self.tokens[owner]

    def submit(self, number: int, prompt: list[int], new_tokens: int, priority: int = 0) -> None:
        self.tokens[number] = list(prompt)
        self.wanted[number] = len(prompt) + new_tokens
        assert self.scheduler.fits(self.wanted[number])
        self.scheduler.submit(number, np.array(prompt, dtype=np.int32), priority)

    def cancel(self, number: int) -> None:
        self.scheduler.cancel(number)
        del self.tokens[number]

    def depth(self, number: int, position: int, stage: int) -> int:
        recursions = self.stages[stage][1]
        if recursions == 1 and stage in (0, len(self.stages) - 1):
            return 1
        return hashed(self.tokens[number][position], position, stage) % (recursions + 1)

    # ---- a step ----

    def step(self) -> bool:
        if not self.scheduler.plan():
            return False
        for stage in range(len(self.stages)):
            self._enter(stage)
            while (batch := self.scheduler.run(stage)) is not None:
                self._pass(stage, batch)
                if self.depthwise:
                    break
        self._sample()
        return True

    def finish(self) -> None:
        while self.step():
            pass

    def _enter(self, stage: int) -> None:
        entry = self.scheduler.enter(stage)
        if stage == 0:
            self._identify(entry)
        tokens = [self.slots[row] for row in entry.rows]
        assert [position for _, position in tokens] == list(entry.positions)
        assert [self.tokens[n][p] for n, p in tokens] == list(entry.ids)
        keep = [self.depth(*token, stage) > 0 for token in tokens]
        if all(keep) and hashed(len(keep)) % 2:
            self.scheduler.choose()
        else:
            self.scheduler.choose(np.array(keep, dtype=bool))

    def _identify(self, entry) -> None:
        for row, position, token in zip(entry.rows, entry.positions, entry.ids, strict=True):
            self.slots[row] = (int(token) >> 8, int(position))

    def _pass(self, stage: int, batch: Pass) -> None:
        layers, recursions = self.stages[stage]
        self.block_rows += layers * len(batch.rows)
        self._copy(batch.block_copies, batch.carried)
        tokens = [self.slots[row] for row in batch.rows]
        depths = list(batch.depths)
        assert [sum(d < r for d in depths) for r in range(recursions + 1)] == batch.depth_rows
        assert all(self.depth(*t, stage) > d for t, d in zip(tokens, depths, strict=True))
        made = np.array(
            [1000 * p + d for (_, p), d in zip(tokens, depths, strict=True)], dtype=np.int64
        )
        groups = np.repeat(np.arange(len(batch.before)), np.diff(batch.cu_rows))
        exits = [self.slots[row] for row in batch.exited_rows]
        exited = np.array([1000 * p + EXIT + self.depth(n, p, stage) for n, p in exits])
        for layer in range(layers):
            if self.strategy in ("hybrid", "frozen"):
                self.memory[batch.writes[layer]] = made
                self.memory[batch.exited_writes[layer]] = exited
            else:
                self._append(batch, layer, groups, made)
            self._check_seen(stage, batch.tables[layer], batch, groups, tokens)
        last = batch.depth_rows[recursions - 1]
        asked = zip(tokens[:last], depths[:last], strict=True)
        keep = np.array([self.depth(*t, stage) > d + 1 for t, d in asked], dtype=bool)
        carry = self.scheduler.advance(keep)
        self._copy(carry.blocks, carry.entries)

    def _append(self, batch: Pass, layer: int, groups: np.ndarray, made: np.ndarray) -> None:
        """As kv_append does; shared, those of the first depth alone."""
        count = batch.depth_rows[1] if self.strategy == "shared" else len(made)
        groups = groups[:count]
        entry = batch.before[groups] + np.arange(count) - batch.cu_rows[groups]
        block = batch.tables[layer][groups, entry // BLOCK_SIZE]
        self.memory[block * BLOCK_SIZE + entry % BLOCK_SIZE] = made[:count]

    def _copy(self, blocks, entries) -> None:
        memory = self.memory.reshape(-1, BLOCK_SIZE)
        memory[blocks.target] = memory[blocks.source]
        self.memory[entries.target] = self.memory[entries.source]

    def _check_seen(self, stage: int, table, batch: Pass, groups, tokens) -> None:
        for row in range(0, len(tokens), 1 + len(tokens) // 4):  # a few of many
            number, position = tokens[row]
            group, limit = groups[row], batch.key_limit[row]
            assert limit <= batch.after[group]
            entry = np.arange(limit)
            block = table[group, entry // BLOCK_SIZE]
            seen = self.memory[block * BLOCK_SIZE + entry % BLOCK_SIZE]
            depth = int(batch.depths[row])
            assert list(seen) == self._visible(number, position, stage, depth)

    def _visible(self, number: int, position: int, stage: int, depth: int) -> list[int]:
        """What the strategy's definition lets a token see at a depth."""
        seen = []
        for p in range(position + 1):
            reached = self.depth(number, p, stage)
            if self.strategy == "recursion_wise" and reached > depth:
                seen.append(1000 * p + depth)
            elif self.strategy == "shared" and reached > 0:
                seen.append(1000 * p)
            elif self.strategy == "hybrid" and reached > 0:
                seen.append(1000 * p + min(reached - 1, depth))
            elif self.strategy == "frozen":
                seen.append(1000 * p + (depth if reached > depth else EXIT + reached))
        return seen

    def _sample(self) -> None:
        sampled = self.scheduler.finish_step()
        ids, tokens = [], []
        for number, row in zip(sampled.ids.tolist(), sampled.rows, strict=True):
            if number not in self.tokens:  # cancelled in this step
                continue
            sequence = self.tokens[number]
            assert self.slots[row][1] == len(sequence) - 1
            if number not in self.started:
                self.started.append(number)
            sequence.append(number << 8 | hashed(*(t & 0xFF for t in sequence)) & 0xFF)
            if len(sequence) == self.wanted[number]:
                self._finish(number)
            else:
                ids.append(number)
                tokens.append(sequence[-1])
        self.scheduler.append(np.array(ids, dtype=np.int64), np.array(tokens, dtype=np.int32))

    def _finish(self, number: int) -> None:
        depth = self.scheduler.depth(number)
        assert depth.tolist() == [
            [self.depth(number, p, s) for s in range(len(self.stages))]
            for p in range(len(self.tokens[number]) - 1)
        ]
        self.outputs[number] = [token & 0xFF for token in self.tokens.pop(number)]
        self.scheduler.finish(number)


def prompt_of(owner: int, length: int) -> list[int]:
    return [owner << 8 | hashed(owner, position) & 0xFF for position in range(length)]
