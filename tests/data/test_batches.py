"""Batches: everything once, little padding, the longest first."""

import random
from array import array

import pytest
import torch
from conftest import SHARED

from litlora.data.batches import collate, num_supervised, padding_share, plan_epoch
from litlora.data.examples import Example, tokenize
from litlora.data.records import SAMPLE_FILE, read_records
from litlora.loss import IGNORE
from litlora.prompts import STYLES
from litlora.settings import JSON
from litlora.tokenizer import Tokenizer


def plan(lengths, *, micro=4, per_step=4, seed=0, longest_first=True):
    return plan_epoch(lengths, micro_batch_size=micro, global_batch_size=micro * per_step, seed=seed, longest_first=longest_first)


@pytest.mark.parametrize("count", [1, 3, 4, 5, 16, 17, 100])
def test_every_example_comes_once_and_none_is_left_over(count):
    steps = plan([random.Random(n).randint(1, 50) for n in range(count)])
    assert sorted(index for step in steps for micro in step for index in micro) == list(range(count))
    assert all(1 <= len(step) <= 4 and all(1 <= len(micro) <= 4 for micro in step) for step in steps)


def test_the_longest_example_comes_first_and_the_order_is_the_seeds():
    lengths = [random.Random(n).randint(1, 500) for n in range(200)]
    steps = plan(lengths)
    assert lengths.index(max(lengths)) in steps[0][0]
    assert steps == plan(lengths) != plan(lengths, seed=1)


@pytest.mark.parametrize("name", ["alpaca_en_demo.json", "alpaca_zh_demo.json"])
def test_padding_of_the_real_data_is_below_5_percent(tmp_path, name):
    path, file = SHARED / "data" / name, SHARED / "tokenizers/gpt_neox_20b_tokenizer.json"
    if not (path.is_file() and file.is_file()):
        pytest.skip(f"{path} or {file} is not at hand")
    (tmp_path / "tokenizer.json").symlink_to(file)
    examples = tokenize(read_records(JSON(path=str(path))).records, Tokenizer(tmp_path), STYLES["alpaca"], 512).examples
    lengths = [len(example.ids) for example in examples]
    assert all(padding_share(lengths, plan(lengths, seed=seed)) < 0.05 for seed in range(5))


def test_padding_of_the_sample_is_below_5_percent(tokenizer_dir):
    records = read_records(JSON(path=str(SAMPLE_FILE))).records
    lengths = [len(e.ids) for e in tokenize(records, Tokenizer(tokenizer_dir), STYLES["alpaca"], 512).examples]
    assert padding_share(lengths, plan(lengths)) < 0.05


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_collate_pads_and_labels(mask_prompt):
    examples = [Example(array("i", ids), prompt) for ids, prompt in (([5, 6, 7, 8], 2), ([9, 1], 0), ([3, 4, 2], 2))]
    batch = collate(examples, mask_prompt=mask_prompt)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8], [9, 1, 0, 0], [3, 4, 2, 0]]
    x = IGNORE
    masked = [[x, x, 7, 8], [9, 1, x, x], [x, x, 2, x]]
    assert batch.labels.tolist() == (masked if mask_prompt else [[5, 6, 7, 8], [9, 1, x, x], [3, 4, 2, x]])
    assert batch.num_tokens == 9
    counted = sum(num_supervised(example, mask_prompt) for example in examples)
    assert counted == int((batch.labels[:, 1:] != x).sum())
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
