"""Several devices: the result of one, whoever started them and however they divide the work."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, random_adapter, succeeds, tiny_config
from families import save_folder
from quantized import quantize_folder
from ranks import train

from litlora.errors import UserError
from litlora.lora import LoRAConfig
from litlora.model import GPT
from litlora.settings import FinetuneFull, FinetuneLoRA, TrainConfig
from litlora.settings.launch import is_first_here, started
from litlora.train.parallel import Parallel

PATHS = os.pathsep.join(map(str, (REPO, REPO / "tests", REPO / "tests/train")))

# ---- who started the processes


def test_torchrun_and_slurm_say_how_many_they_started():
    assert started({}) is None and started({"WORLD_SIZE": "8"}) is None
    elastic = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    found = started(elastic)
    assert (found.by, found.total, found.devices) == ("torchrun", 8, 4)
    found = started({"SLURM_NTASKS": "6", "SLURM_NTASKS_PER_NODE": "3", "SLURM_JOB_NAME": "tune"})
    assert (found.by, found.total, found.devices) == ("SLURM", 6, 3)
    assert started({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "interactive"}) is None
    assert not is_first_here(elastic) and is_first_here({}) and not is_first_here({"SLURM_LOCALID": "2"})


@pytest.mark.parametrize(
    ("given", "found"), [({}, (2, 2)), ({"devices": 2}, (2, 2)), ({"num_nodes": 2}, (2, 2))]
)
def test_what_is_not_given_is_what_was_started(given, found, monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert FinetuneLoRA(**given).num_devices == found


def test_other_numbers_than_were_started_are_refused(monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="devices 4 and num_nodes 1: the launcher started 4 processes, 2 on"):
        FinetuneLoRA(devices=4)


FSDP = {"devices": 2, "strategy": "fsdp"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (lambda: FinetuneLoRA(strategy="fsdp"), "strategy fsdp: one device has nobody to share with"),
        (lambda: FinetuneLoRA(train=TrainConfig(auto_batch=True), **FSDP), "auto_batch and strategy fsdp"),
        (lambda: FinetuneLoRA(train=TrainConfig(compile=True), **FSDP), "compile and strategy fsdp"),
        (lambda: FinetuneLoRA(lora=LoRAConfig(init="eva"), **FSDP), "init eva and strategy fsdp"),
        (lambda: FinetuneFull(train=TrainConfig(optimizer="adafactor"), **FSDP), "optimizer adafactor and"),
        (lambda: FinetuneLoRA(num_nodes=2), "num_nodes 2: MASTER_ADDR and MASTER_PORT and NODE_RANK must"),
        (
            lambda: FinetuneLoRA(devices=3, train=TrainConfig(packing=False)),
            "global_batch_size 16: must be a multiple of micro_batch_size 4 times devices 3",
        ),
    ],
)
def test_what_several_devices_cannot_do_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        settings()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_more_devices_than_there_are_is_one_line():
    with pytest.raises(UserError, match="devices 2: this machine has 0 of kind cuda; lower it"):
        Parallel("cuda", 2)


# ---- the same result


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def ranks(count: int, directory: Path, cases: list[dict]) -> dict[str, dict]:
    """What `count` processes learn, by the names of the cases."""
    port = free_port()
    words = [sys.executable, str(REPO / "tests/train/ranks.py"), str(directory), json.dumps(cases)]
    processes = [
        subprocess.Popen(
            words,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **{"LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"},
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": PATHS},
            },
        )
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors
    return {case["name"]: torch.load(directory / f"{case['name']}.pth", weights_only=True) for case in cases}


def farthest(ours: dict, theirs: dict) -> float:
    assert ours.keys() == theirs.keys()
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(("strategy", "count"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_many_ranks_learn_what_one_does(strategy, count, method, packing, tmp_path):
    """Ranks with unequal numbers of tokens and of micro-batches, a last step that is smaller, and
    clipping. In float64, even AdamW, which divides by the size of a gradient, differs by rounding
    alone; in fp32, SGD within 1e-6."""
    same = {"strategy": strategy, "method": method}
    train_settings = {"packing": packing, "max_grad_norm": 0.5}
    cases = [
        {"name": "float64", "dtype": "float64", "train": train_settings, **same},
        {"name": "float32", "dtype": "float32", "train": {**train_settings, "optimizer": "sgd"}, **same},
    ]
    found = ranks(count, tmp_path, cases)
    for case, limit in zip(cases, (1e-12, 1e-6), strict=True):
        train(Parallel("cpu"), case, tmp_path)
        one = torch.load(tmp_path / f"{case['name']}.pth", weights_only=True)
        assert farthest(found[case["name"]]["model"], one["model"]) < limit
        assert abs(found[case["name"]]["val_loss"] - one["val_loss"]) < limit * 10


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_more_micro_batches_exchange_no_more_gradients(strategy, tmp_path):
    same = {"strategy": strategy, "method": "lora", "dtype": "float32"}
    cases = [
        {"name": name, "train": {"micro_batch_tokens": tokens, "eval_interval": 0}, **same}
        for name, tokens in (("many", 30), ("one", 4000))
    ]
    found = {name: case["exchanged"] for name, case in ranks(2, tmp_path, cases).items()}
    assert found["many"]["allreduce_"] == found["one"]["allreduce_"] > 0
    if strategy == "ddp":
        assert found["many"] == found["one"]
    else:  # the base is fetched for each
        assert found["many"]["_allgather_base_"] > found["one"]["_allgather_base_"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_divided_base_moves_its_activations_and_none_of_the_weights_it_fetched(method, tmp_path):
    same, moved = {"method": method, "dtype": "float64"}, {}
    plain = ranks(2, tmp_path, [{"name": "plain", "strategy": "fsdp", "train": {}, **same}])["plain"]
    for strategy in ("ddp", "fsdp"):
        case = {"name": strategy, "strategy": strategy, "train": {"offload_activations": True}, **same}
        found = ranks(2, tmp_path, [case])[strategy]
        moved[strategy] = found["moved"]
        assert farthest(found["model"], plain["model"]) < 1e-12
    assert moved["fsdp"] == moved["ddp"] and min(moved["fsdp"]) > 0 and not any(plain["moved"])


@pytest.mark.slow
@pytest.mark.parametrize(("quantize", "count"), [("nf4", 2), ("int8", 4), ("nf4-dq", 2)])
def test_a_divided_base_in_few_bits_learns_what_a_whole_one_does(quantize, count, tmp_path):
    """QLoRA; and no bit of the base is on two ranks."""
    same = {"strategy": "fsdp", "method": "lora", "quantize": quantize}
    cases = [
        {"name": "float64", "dtype": "float64", "train": {"max_grad_norm": 0.5}, **same},
        {"name": "float32", "dtype": "float32", "train": {"optimizer": "sgd"}, **same},
    ]
    found = ranks(count, tmp_path, cases)
    for case, limit in zip(cases, (1e-12, 1e-6), strict=True):
        many = found[case["name"]]
        train(Parallel("cpu"), case, tmp_path)
        one = torch.load(tmp_path / f"{case['name']}.pth", weights_only=True)
        assert farthest(many["model"], one["model"]) < limit
        assert abs(many["val_loss"] - one["val_loss"]) < limit * 10
        adapter = sum(tensor.nbytes for tensor in one["model"].values())
        base = one["held"][0]["weights"] - adapter
        held = [rank["weights"] - adapter for rank in many["held"]]
        assert base <= sum(held) <= base + 14 * 16 * 3 and max(held) < 1.1 * base / count


# ---- memory


def device_memory():
    """benchmarks/device_memory.py"""
    spec = importlib.util.spec_from_file_location("device_memory", REPO / "benchmarks/device_memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["device_memory"] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_page_has_the_table_that_is_computed():
    assert device_memory().table() in (REPO / "docs/many-gpus.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_device_holds_what_is_computed(method, tmp_path):
    case = {"name": "held", "strategy": "fsdp", "method": method, "dtype": "float32", "train": {}}
    found = ranks(4, tmp_path, [case])["held"]["held"]
    computed = device_memory().held(tiny_config(), method, 4, itemsize=4, rank=LoRAConfig().rank)
    assert found[0] == {"weights": computed.weights, "moments": computed.moments}
    whole = sum(parameter.nbytes for parameter in GPT(tiny_config()).parameters())
    adapter = computed.moments // 2 if method == "lora" else 0
    assert sum(rank["weights"] for rank in found) == whole + 4 * adapter


# ---- the commands


def words_for(out, base, data, *more):
    return [
        *("--checkpoint_dir", base, "--data", "JSON", "--data.path", data, "--out_dir", out),
        *("--precision", "32-true", "--accelerator", "cpu", "--train.global_batch_size", 6),
        *("--train.max_steps", 6, "--train.micro_batch_tokens", 200, "--train.save_interval", 2),
        *more,
    ]


SGD = ("--train.optimizer", "sgd", "--train.learning_rate", 0.1)
"""Of which each step is as large as its gradient, not as the rounding of one that is 0."""


def learned(out) -> dict:
    return torch.load(out / "final/lit_model.pth", weights_only=True)["model"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_divided_run_resumes_on_another_number_of_devices(method, base, alpaca_file, tmp_path):
    """Stopped with the base divided among two, gone on with among three; the file is that of one
    device."""
    script, more = f"finetune/{method}.py", ("--train.log_interval", 4)
    succeeds(script, *words_for(tmp_path / "one", base, alpaca_file, *more), OMP_NUM_THREADS="1")
    words = words_for(tmp_path / "many", base, alpaca_file, *more, "--strategy", "fsdp")
    done = succeeds(script, *words, "--devices", 2, "--train.max_time", 1e-4, OMP_NUM_THREADS="1")
    assert "stopped by max_time after step 1" in done.stdout
    done = succeeds(script, *words, "--devices", 3, "--resume", "auto", OMP_NUM_THREADS="1")
    assert "note: devices is 3, and was 2: the result is that of the uninterrupted run up" in done.stdout
    one, many = (tmp_path / name / "final/lit_model.pth" for name in ("one", "many"))
    assert one.stat().st_size == many.stat().st_size
    for name, weight in learned(tmp_path / "one").items():
        torch.testing.assert_close(learned(tmp_path / "many")[name], weight, atol=2e-5, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("lora", ("--lora.init", "pissa")),
        ("lora", ("--lora.init", "olora", "--quantize", "int8")),
        ("lora", ("--lora.init", "loftq", "--quantize", "nf4")),
        ("lora", ("--lora.init", "loftq_iter_2", "--quantize", "nf4")),
        ("lora", ("--lora.variant", "dora", "--train.checkpoint_activations", "full")),
        ("full", ("--train.freeze", "[embed_tokens,layers.0,layers.1.mlp.up_proj]")),
        ("distill", ("--distill.top_k", 8)),
    ],
    ids=["pissa", "olora", "loftq", "loftq twice", "dora", "freeze", "distill"],
)
def test_what_a_divided_base_takes_ends_as_on_one_device(method, words, base, alpaca_file, tmp_path):
    teacher = ()
    if method == "distill":
        settings = LoRAConfig(rank=2, targets="all-linear")
        teacher = ("--teacher", random_adapter(tmp_path / "teacher", base, settings))
    more = (*words, *teacher, "--train.max_steps", 3, *SGD)
    for out, words in (("one", ()), ("many", ("--strategy", "fsdp", "--devices", 2))):
        words = words_for(tmp_path / out, base, alpaca_file, *more, *words)
        succeeds(f"finetune/{method}.py", *words, OMP_NUM_THREADS="1")
    assert farthest(learned(tmp_path / "one"), learned(tmp_path / "many")) < 1e-6


@pytest.mark.slow
def test_a_chain_is_merged_while_it_is_divided(base, alpaca_file, tmp_path):
    """DPO on an adapter that was trained before, in bits of its own."""
    first = tmp_path / "first"
    words = words_for(first, base, alpaca_file, "--quantize", "int8", "--train.max_steps", 2)
    succeeds("finetune/lora.py", *words, OMP_NUM_THREADS="1")
    pairs = tmp_path / "pairs.json"
    answers = [("ja " * n, "nein " * (9 - n)) for n in range(1, 9)]
    records = [{"prompt": "Und?", "chosen": good, "rejected": bad} for good, bad in answers]
    pairs.write_text(json.dumps(records))
    for out, more in (("one", ()), ("many", ("--strategy", "fsdp", "--devices", 2))):
        words = words_for(tmp_path / out, first / "final", pairs, *more, *SGD)
        succeeds("finetune/dpo.py", *words, "--train.max_steps", 2, OMP_NUM_THREADS="1")
    assert farthest(learned(tmp_path / "one"), learned(tmp_path / "many")) < 1e-6


@pytest.mark.slow
def test_a_divided_quantised_run_resumes_and_merges_as_one_of_one_device(base, alpaca_file, tmp_path):
    """Its adapter names the bits of the base that it was trained on, which a merge verifies."""
    more = ("--quantize", "nf4", "--train.log_interval", 4, *SGD)
    script = "finetune/lora.py"
    succeeds(script, *words_for(tmp_path / "one", base, alpaca_file, *more), OMP_NUM_THREADS="1")
    words = words_for(tmp_path / "many", base, alpaca_file, *more, "--strategy", "fsdp", "--devices", 2)
    succeeds(script, *words, "--train.max_time", 1e-4, OMP_NUM_THREADS="1")
    done = succeeds(script, *words, "--resume", "auto", OMP_NUM_THREADS="1")
    assert "1 steps done" in done.stdout and "quantised: 14 layers to nf4" in done.stdout
    one, many = (
        torch.load(tmp_path / name / "final/lit_model.pth", weights_only=True) for name in ("one", "many")
    )
    assert one["litlora"]["base"]["quantized"] == many["litlora"]["base"]["quantized"]
    assert farthest(one["model"], many["model"]) < 1e-6
    merged = succeeds(
        "scripts/merge_lora.py", "--checkpoint_dir", base, "--lora_path", tmp_path / "many/final",
        "--out_dir", tmp_path / "merged",
    )  # fmt: skip
    assert "verified" in merged.stdout


@pytest.mark.slow
def test_a_base_that_is_stored_in_few_bits_is_divided(tokenizer_dir, alpaca_file, tmp_path):
    base = tmp_path / "base"
    save_folder("llama", base, vocab_size=400)
    quantize_folder(base, "nf4", nested=True)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, base)
    more = ("--prompt_style", "plain", "--train.max_steps", 3, *SGD)
    for out, words in (("one", ()), ("many", ("--strategy", "fsdp", "--devices", 2))):
        words = words_for(tmp_path / out, base, alpaca_file, *more, *words)
        succeeds("finetune/lora.py", *words, OMP_NUM_THREADS="1")
    assert farthest(learned(tmp_path / "one"), learned(tmp_path / "many")) < 1e-6


@pytest.mark.slow
def test_torchrun_makes_one_run(base, alpaca_file, tmp_path):
    words = [str(word) for word in words_for(tmp_path / "out", base, alpaca_file)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launcher, "--master_port", free_port(), str(REPO / "finetune/lora.py"), *words],
        capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("result: ") == 1
    assert "devices: 2\n" in (tmp_path / "out/hyperparameters.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_a_machine_that_cannot_be_reached_is_one_line(node):
    code = (
        "from litlora.train.parallel import Parallel; from litlora.errors import UserError\n"
        "try:\n    Parallel('cpu', 1, 2, join=5).launch(0)\n"
        "except UserError as error:\n    print(error)"
    )
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "NODE_RANK": str(node)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, **place, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert done.stdout.startswith("the 2 processes of the run did not find each other at 127.0.0.1, port"), (
        done
    )
    assert done.stdout.count("\n") == 1 and not done.stderr
