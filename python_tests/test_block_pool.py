"""Blocks and lanes of the engine's K/V cache: who holds what, and what is copied when."""

import random

import pytest

from mor_ext._engine import BLOCK_SIZE, BlockPool, Copies, Lane


def test_blocks_go_out_once_and_come_back():
    pool = BlockPool(5)
    blocks = [pool.take() for _ in range(5)]
    assert sorted(blocks) == list(range(5)) and pool.num_free == 0
    pool.share(blocks[2])
    pool.drop(blocks[2])
    assert pool.num_free == 0 and pool.users(blocks[2]) == 1
    pool.drop(blocks[2])
    assert pool.num_free == 1 and pool.take() == blocks[2]


def test_kept_blocks_are_counted_as_long_as_nobody_else_uses_them():
    pool = BlockPool(3)
    block = pool.take()
    pool.share(block)
    pool.keep(block)
    assert (pool.num_free, pool.num_kept, pool.users(block)) == (2, 0, 2)
    pool.drop(block)
    assert (pool.num_free, pool.num_kept, pool.users(block)) == (2, 1, 1)
    pool.share(block)
    assert pool.num_kept == 0
    pool.drop_kept(block)
    assert (pool.num_free, pool.num_kept, pool.users(block)) == (2, 0, 1)
    pool.keep(block)
    pool.drop_kept(block)
    assert (pool.num_free, pool.num_kept, pool.users(block)) == (3, 0, 0)


def test_misuse_of_blocks_is_an_error():
    pool = BlockPool(1)
    for misuse in (pool.share, pool.drop, pool.keep, pool.drop_kept):
        with pytest.raises(RuntimeError, match="block 0 is free"):
            misuse(0)
    pool.take()
    with pytest.raises(RuntimeError, match="block 0 has no such user"):
        pool.drop_kept(0)
    pool.keep(0)
    with pytest.raises(RuntimeError, match="block 0 has no such user"):
        pool.drop(0)
    with pytest.raises(RuntimeError, match="no block is free"):
        pool.take()
    with pytest.raises(IndexError):
        pool.drop(1)


@pytest.mark.parametrize("num_blocks", [-1, 2**31 // BLOCK_SIZE])
def test_pools_that_cannot_be_addressed_are_refused(num_blocks):
    with pytest.raises(ValueError, match=rf"num_blocks must be in \[0, .*\], got {num_blocks}"):
        BlockPool(num_blocks)


def test_a_lane_takes_a_block_of_each_layer_for_16_entries():
    pool, lane, copies = BlockPool(20), Lane(3), Copies()
    for entries, blocks in [(0, 0), (1, 3), (16, 3), (17, 6), (48, 9)]:
        added = entries - lane.entries
        assert lane.blocks_to_append(pool, added) == blocks - len(lane.blocks)
        lane.append(pool, added, copies)
        assert (lane.entries, len(lane.blocks), pool.num_free) == (entries, blocks, 20 - blocks)
    addresses = {lane.address(layer, entry) for layer in range(3) for entry in range(48)}
    assert len(addresses) == 3 * 48
    assert {address // BLOCK_SIZE for address in addresses} == set(lane.blocks)
    assert len(copies) == 0
    lane.clear(pool)
    assert pool.num_free == 20 and lane.entries == 0


def test_a_shared_page_is_copied_by_who_appends_first():
    pool, lane, copies = BlockPool(20), Lane(2), Copies()
    lane.append(pool, 20, copies)
    fork = lane.prefix(pool, 18)
    assert list(fork.blocks) == list(lane.blocks) and pool.num_free == 16
    assert fork.blocks_to_append(pool, 1) == lane.blocks_to_append(pool, 1) == 2

    shared = list(lane.blocks)
    fork.append(pool, 1, copies)
    assert list(copies.source) == shared[2:] and list(copies.target) == list(fork.blocks)[2:]
    assert list(fork.blocks)[:2] == shared[:2] and not set(fork.blocks[2:]) & set(shared)
    assert lane.blocks_to_append(pool, 1) == 0  # the page is its own again
    lane.append(pool, 1, copies)
    assert list(lane.blocks) == shared and len(copies) == 2


def test_a_prefix_of_whole_pages_copies_nothing():
    pool, lane, copies = BlockPool(20), Lane(1), Copies()
    lane.append(pool, 40, copies)
    fork = lane.prefix(pool, 32)
    fork.append(pool, 1, copies)
    assert len(copies) == 0 and list(fork.blocks)[:2] == list(lane.blocks)[:2]
    lane.clear(pool)
    assert pool.num_free == 20 - 3
    with pytest.raises(ValueError, match="within the lane"):
        fork.prefix(pool, 34)


def test_a_kept_lane_is_cut_and_its_pages_are_copied_by_who_appends():
    pool, lane, copies = BlockPool(20), Lane(1), Copies()
    lane.append(pool, 40, copies)
    lane.keep(pool, 20)
    assert (lane.entries, pool.num_free, pool.num_kept) == (20, 18, 2)
    heir = lane.prefix(pool, 20)
    assert pool.num_kept == 0 and heir.blocks_to_append(pool, 1) == 1
    heir.append(pool, 1, copies)
    assert list(copies.source) == list(lane.blocks)[1:] and pool.num_kept == 1
    lane.clear(pool)
    assert (pool.num_free, pool.num_kept) == (18, 0)
    heir.clear(pool)
    assert pool.num_free == 20


def test_entries_survive_any_order_of_appends_forks_and_ends():
    """Random lanes against lists: what each lane wrote is what it reads, through all copies."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed = {seed}")
    rng = random.Random(seed)
    pool = BlockPool(120)
    memory: dict[int, int] = {}  # address: value
    lanes: list[tuple[Lane, list[int]]] = []
    value = 0
    kept: list[tuple[Lane, list[int]]] = []

    for _ in range(2000):
        action = rng.random()
        if action < 0.15 or not lanes:
            lanes.append((Lane(2), []))
        elif action < 0.3:
            lane, held = rng.choice(lanes + kept)
            count = rng.randint(0, len(held))
            lanes.append((lane.prefix(pool, count), held[:count]))
        elif action < 0.38:
            lane, held = lanes.pop(rng.randrange(len(lanes)))
            count = rng.randint(0, len(held))
            lane.keep(pool, count)
            kept.append((lane, held[:count]))
        elif action < 0.52:
            ended = rng.choice([lanes, kept or lanes])
            ended.pop(rng.randrange(len(ended)))[0].clear(pool)
        else:
            lane, held = rng.choice(lanes)
            count, copies, free = rng.randint(0, 20), Copies(), pool.num_free
            wanted = lane.blocks_to_append(pool, count)
            if wanted > free:
                continue
            lane.append(pool, count, copies)
            assert pool.num_free >= free - wanted
            for source, target in zip(copies.source, copies.target, strict=True):
                for place in range(BLOCK_SIZE):
                    content = memory.get(source * BLOCK_SIZE + place, -1)
                    memory[target * BLOCK_SIZE + place] = content
            for entry in range(len(held), len(held) + count):
                value += 1
                held.append(value)
                for layer in range(2):
                    memory[lane.address(layer, entry)] = 2 * value + layer
        lane, held = rng.choice(lanes + kept) if lanes + kept else (Lane(2), [])
        for layer in range(2):
            read = [memory[lane.address(layer, entry)] for entry in range(len(held))]
            assert read == [2 * written + layer for written in held]
    for lane, _ in lanes:
        lane.clear(pool)
    assert pool.num_free + pool.num_kept == 120
    for lane, _ in kept:
        lane.clear(pool)
    assert pool.num_free == 120
