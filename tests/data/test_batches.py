"""Batches: everything once, no padding or little of it, the largest first."""

import random
import tracemalloc
from array import array
from collections.abc import Sequence

import pytest
import torch
from conftest import SHARED

from litlora.data.batches import Step, collate, num_supervised, pack, padding_share, plan_epoch
from litlora.data.examples import Example, tokenize
from litlora.data.sources import SAMPLE_FILE, read_dataset
from litlora.prompts import STYLES
from litlora.settings import JSON, TrainConfig
from litlora.tokenizer import Tokenizer
from litlora.train.plan import Plan


def plan(lengths, *, micro=4, per_step=4, pack_tokens=None, num_ranks=1, seed=0, longest_first=True):
    return list(
        plan_epoch(
            lengths,
            global_batch_size=micro * per_step,
            micro_batch_size=micro,
            pack_tokens=pack_tokens,
            num_ranks=num_ranks,
            seed=seed,
            longest_first=longest_first,
        )
    )


@pytest.mark.parametrize("pack_tokens", [None, 1, 60, 1000])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 17, 100])
def test_every_example_comes_once_and_none_is_left_over(count, pack_tokens):
    steps = plan([random.Random(n).randint(1, 50) for n in range(count)], pack_tokens=pack_tokens)
    assert sorted(index for step in steps for micro in step for index in micro) == list(range(count))
    assert len(steps) == -(-count // 16)
    if pack_tokens is None:
        assert all(1 <= len(step) <= 4 and all(1 <= len(micro) <= 4 for micro in step) for step in steps)
    else:
        assert sorted(sum(map(len, step)) for step in steps)[1:] == [16] * (len(steps) - 1)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_packs_are_few_even_and_within_their_size(seed, num_ranks):
    rng = random.Random(seed)
    lengths = [rng.randint(1, rng.choice([20, 100, 300])) for _ in range(64)]
    packs = pack(range(64), lengths, 256, num_ranks)
    loads = [sum(lengths[index] for index in one) for one in packs]
    assert all(load <= 256 or len(one) == 1 for load, one in zip(loads, packs, strict=True))
    fewest = -(-sum(lengths) // 256)
    assert len(packs) <= 1.25 * fewest + num_ranks
    short = [min(length, 20) for length in lengths]
    packs = pack(range(64), short, 256, num_ranks)
    loads = [sum(short[index] for index in one) for one in packs]
    assert len(packs) % num_ranks == 0 and max(loads) - min(loads) <= 20


def test_packs_spare_ranks_that_have_no_example():
    assert pack([0, 1, 2], [5, 6, 7], 100, num_ranks=4) == [[2], [1], [0]]


def test_the_longest_example_comes_first_and_the_order_is_the_seeds():
    lengths = [random.Random(n).randint(1, 500) for n in range(200)]
    steps = plan(lengths)
    assert lengths.index(max(lengths)) in steps[0][0]
    assert steps == plan(lengths) != plan(lengths, seed=1)
    steps = plan(lengths, pack_tokens=700)
    assert max(lengths[index] for micro in steps[0] for index in micro) >= 15 / 16 * max(lengths)
    for other in ({"pack_tokens": 5000}, {"pack_tokens": 700, "num_ranks": 3}):
        examples = [
            [sorted(index for micro in step for index in micro) for step in way]
            for way in (steps, plan(lengths, **other))
        ]
        assert examples[0] == examples[1], "what a step learns from does not depend on how it is computed"
    assert steps == plan(lengths, pack_tokens=700) != plan(lengths, pack_tokens=700, seed=1)


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json"])
def test_padding_of_the_real_data_is_below_5_percent(tmp_path, name):
    path, file = SHARED / "data" / name, SHARED / "tokenizers/gpt_neox_20b_tokenizer.json"
    if not (path.is_file() and file.is_file()):
        pytest.skip(f"{path} or {file} is not at hand")
    (tmp_path / "tokenizer.json").write_bytes(file.read_bytes())
    examples = tokenize(
        read_dataset(JSON(path=str(path))).conversations, Tokenizer(tmp_path), STYLES["alpaca"], 512
    ).examples
    lengths = [len(example.ids) for example in examples]
    assert all(padding_share(lengths, plan(lengths, seed=seed)) < 0.05 for seed in range(5))


def test_padding_of_the_sample_is_below_5_percent(tokenizer_dir):
    records = read_dataset(JSON(path=str(SAMPLE_FILE))).conversations
    lengths = [
        len(e.ids) for e in tokenize(records, Tokenizer(tokenizer_dir), STYLES["alpaca"], 512).examples
    ]
    assert padding_share(lengths, plan(lengths)) < 0.05


@pytest.mark.parametrize("mask_prompt", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_collate_lays_out_and_tells_what_is_learned(packed, mask_prompt):
    examples = [
        Example(array("i", ids), ((prompt, len(ids)),))
        for ids, prompt in (([5, 6, 7, 8], 2), ([9, 1], 0), ([3, 4, 2], 2))
    ]
    batch = collate(examples, mask_prompt=mask_prompt, packed=packed)
    if packed:
        assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 1, 3, 4, 2]] and batch.lengths == [4, 2, 3]
    else:
        assert (
            batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 1, 0, 0], [3, 4, 2, 0]] and batch.lengths is None
        )
    before = batch.input_ids.flatten()[batch.positions].tolist()
    learned = (
        [(6, 7), (7, 8), (9, 1), (4, 2)] if mask_prompt else [(5, 6), (6, 7), (7, 8), (9, 1), (3, 4), (4, 2)]
    )
    assert list(zip(before, batch.targets.tolist(), strict=True)) == learned
    assert sum(num_supervised(example, mask_prompt) for example in examples) == len(learned)
    assert batch.input_ids.dtype == batch.targets.dtype == torch.int64


@pytest.mark.parametrize("packed", [True, False])
def test_collate_learns_every_span_and_no_first_token(packed):
    examples = [
        Example(array("i", ids), spans)
        for ids, spans in (
            ([5, 6, 7, 8, 9], ((0, 2), (3, 4))),
            ([1, 2, 3], ()),
            ([4], ((0, 1),)),
            ([2, 3, 4], ((1, 3),)),
        )
    ]
    batch = collate(examples, mask_prompt=True, packed=packed)
    before = batch.input_ids.flatten()[batch.positions].tolist()
    assert list(zip(before, batch.targets.tolist(), strict=True)) == [(5, 6), (7, 8), (2, 3), (3, 4)]
    assert [num_supervised(example, True) for example in examples] == [2, 0, 0, 2]
    assert [num_supervised(example, False) for example in examples] == [4, 2, 0, 2]
    nothing = collate(examples[1:3], mask_prompt=True, packed=packed)
    assert nothing.positions.tolist() == nothing.targets.tolist() == []


def test_a_plan_made_step_by_step_is_that_of_earlier_versions():
    """Runs that were stopped under an earlier version resume in the middle of its plan."""
    rng = random.Random(1)
    for _ in range(400):
        count, most, micro = (
            rng.choice([1, 2, 3, 5, 17, 64, 100]),
            rng.choice([3, 50, 900]),
            rng.randint(1, 4),
        )
        lengths = [rng.randint(1, most) for _ in range(count)]
        settings = {
            "global_batch_size": micro * rng.choice([1, 2, 5]),
            "micro_batch_size": micro,
            "pack_tokens": rng.choice([None, 1, 60, 1000]),
            "num_ranks": rng.choice([1, 2, 3]),
            "seed": rng.randint(0, 9),
            "longest_first": rng.random() < 0.5,
        }
        steps = plan_epoch(array("i", lengths), **settings)
        expected = earlier_plan(lengths, **settings)
        assert len(steps) == len(expected) and list(steps) == expected
        config = TrainConfig(
            packing=settings["pack_tokens"] is not None,
            global_batch_size=settings["global_batch_size"],
            micro_batch_size=micro,
        )
        assert Plan(lengths, config, 0).steps_per_epoch == len(expected)


def test_a_plan_of_many_examples_takes_little_memory_and_time():
    lengths = array("i", (20 + n * 7919 % 900 for n in range(200_000)))
    for pack_tokens in (None, 2048):
        tracemalloc.start()
        try:
            steps = plan_epoch(
                lengths,
                global_batch_size=16,
                micro_batch_size=4,
                pack_tokens=pack_tokens,
                seed=1,
                longest_first=True,
            )
            assert sum(map(len, steps[len(steps) // 2])) == 16
            kept, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert kept < 6 * len(lengths) and peak < 40 * len(lengths)


def earlier_plan(
    lengths: Sequence[int],
    *,
    global_batch_size: int,
    micro_batch_size: int,
    pack_tokens: int | None,
    num_ranks: int = 1,
    seed: int,
    longest_first: bool,
) -> list[Step]:
    """As it was when every step was made at once."""
    rng = random.Random(seed)
    if pack_tokens is not None:
        groups = _shuffled_groups(lengths, global_batch_size, rng, longest_first=longest_first)
        return [pack(group, lengths, pack_tokens, num_ranks) for group in groups]
    micro_batches = _groups_of_similar_length(lengths, micro_batch_size, rng)
    if longest_first:
        longest = [max(lengths[index] for index in micro) for micro in micro_batches]
        micro_batches.insert(0, micro_batches.pop(longest.index(max(longest))))
    return _chunks(micro_batches, global_batch_size // micro_batch_size)


def _shuffled_groups(
    lengths: Sequence[int], size: int, rng: random.Random, *, longest_first: bool
) -> list[list[int]]:
    """The examples of each packed step."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    groups = _chunks(order, size)
    if longest_first:
        # Chosen by lengths alone: the order of the steps must not depend on how they are packed.
        long = 15 / 16 * max(lengths)
        candidates = (i for i, group in enumerate(groups) if max(lengths[index] for index in group) >= long)
        first = min(candidates, key=lambda i: sum(lengths[index] for index in groups[i]))
        groups.insert(0, groups.pop(first))
    return groups


def _groups_of_similar_length(lengths: Sequence[int], size: int, rng: random.Random) -> list[list[int]]:
    """The padded micro-batches of an epoch, in random order."""
    # Lengths are blurred a little before sorting, so that the same examples do not meet in every
    # epoch.
    order = sorted(range(len(lengths)), key=lambda index: lengths[index] * (1 + 0.02 * rng.random()))
    rest = len(order) % size
    # The incomplete micro-batch has the shortest examples, where it costs least.
    micro_batches = ([order[:rest]] if rest else []) + _chunks(order[rest:], size)
    rng.shuffle(micro_batches)
    return micro_batches


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]
