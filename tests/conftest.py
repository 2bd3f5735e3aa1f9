"""Fixtures: tiny real checkpoints, and the real data and tokenizer where they are at hand."""

import gc
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

# Tests run side by side: a thread each, or they wait for each other's. Before anything imports torch,
# which reads it once.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from litlora import report
from litlora.adapters.merge import merge_chain
from litlora.checkpoint import Beside, reference_to, resolve, write_adapter, write_full
from litlora.cli import parse
from litlora.config import ModelConfig
from litlora.lora import Adapter, LoRAConfig, adapter_of, add_lora
from litlora.lora.adapter import parse_tensors
from litlora.model import GPT, kind_of
from litlora.prompts import STYLES
from litlora.report.events import Event, Step
from litlora.report.sinks import Sink
from litlora.settings import JSON, FinetuneFull, FinetuneLoRA, TrainConfig

# Looking for garbage among a million imported objects every 700 new ones took a twentieth of the time.
gc.set_threshold(500_000)

REPO = Path(__file__).parent.parent
SHARED = REPO.parent / "shared"
QUICKSTART = REPO / "checkpoints/litlora/quickstart"

TEXT = [
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response: paired with an input that provides further context",
    "the quick brown fox jumps over the lazy dog; one two three four five six seven eight nine ten",
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    # torch.manual_seed writes down, for each kind of device that may be used later, where it was called.
    torch.default_generator.manual_seed(0)


def tiny_config(**changes) -> ModelConfig:
    facts = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    return ModelConfig(**{**facts, **changes})


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A byte-level BPE tokenizer of about 300 tokens, with <|endoftext|>."""
    directory = tmp_path_factory.mktemp("tokenizer")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return directory


@pytest.fixture
def make_checkpoint(tmp_path, tokenizer_dir) -> Callable[..., Path]:
    """make_checkpoint("name", seed=0, dtype=torch.float32, **config changes) -> a full checkpoint
    directory of random weights."""

    def make(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Path:
        torch.manual_seed(seed)
        config = tiny_config(**changes)
        model = GPT(config).to(dtype)
        write_full(tmp_path / name, dict(model.named_parameters()), config, sidecars_from=[tokenizer_dir])
        return tmp_path / name

    return make


@pytest.fixture
def base(make_checkpoint) -> Path:
    return make_checkpoint("base")


def random_adapter(directory: Path, base_dir: Path, settings: LoRAConfig, *, seed: int = 1) -> Path:
    """An adapter as a run leaves it, but with random A, B and whole modules."""
    torch.manual_seed(seed)
    chain = resolve(base_dir)
    tensors, config = merge_chain(chain)
    model = kind_of(config).from_tensors(config, tensors)
    if not model.packs:
        model.check_causal(str(base_dir))
    add_lora(model, settings)
    adapter = adapter_of(model, settings)
    random = {name: torch.randn_like(tensor) * 0.1 for name, tensor in adapter.tensors.items()}
    adapter = Adapter(settings, *parse_tensors(random, settings), reference_to(chain.top, directory))
    beside = Beside(prompt_style=STYLES["alpaca"])
    write_adapter(directory, adapter, chain.config, sidecars_from=chain.sources, beside=beside)
    return directory


def resident(file: Path) -> int:
    """Bytes of a file that are mapped and in this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = line.endswith(str(file))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture
def alpaca_file(tmp_path) -> Path:
    """A small file of records of very different lengths."""
    records = [
        {
            "instruction": f"Repeat {'the fox ' * (n % 5)}{n}.",
            "input": f"number {n}" if n % 3 else "",
            "output": f"{n} " * (1 + n % 7),
        }
        for n in range(40)
    ]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(records))
    return path


class AfterStep(Sink):
    """Calls something once so many steps are done; an error in it ends the run."""

    fatal = (Exception,)

    def __init__(self, step: int, call: Callable[[], None]) -> None:
        self.step, self.call = step, call

    def handle(self, event: Event) -> None:
        if isinstance(event, Step) and event.step == self.step:
            self.call()


@contextmanager
def extra_sinks(*sinks: Sink) -> Iterator[None]:
    """Every run inside the block tells its events to these sinks too."""
    factories = [lambda run_dir, sink=sink: sink for sink in sinks]
    report.SINKS.extend(factories)
    try:
        yield
    finally:
        for factory in factories:
            report.SINKS.remove(factory)


@pytest.fixture
def run(base, alpaca_file):
    """run("lora", out_dir, *words): a fine-tuning command in this process: 36 examples to train on,
    6 steps an epoch, and one epoch unless `words` say otherwise.

    `stop_after` ends it after so many steps by a real SIGTERM; `at=(step, call)` calls something
    once so many steps are done.
    """
    methods = {"lora": FinetuneLoRA, "full": FinetuneFull}
    sizes = [
        "--train.epochs",
        1,
        "--train.micro_batch_tokens",
        400,
        "--train.micro_batch_size",
        2,
        "--train.global_batch_size",
        6,
        "--data.val_fraction",
        0.1,
    ]
    sizes += [
        "--train.log_interval",
        5,
        "--train.eval_interval",
        4,
        "--train.save_interval",
        0,
        "--accelerator",
        "cpu",
    ]

    def run(method, out, *words, stop_after=None, at=None):
        spec = importlib.util.spec_from_file_location(f"command_{method}", REPO / f"finetune/{method}.py")
        command = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(command)
        inputs = ["--checkpoint_dir", base, "--data", "JSON", "--data.path", alpaca_file, "--out_dir", out]
        settings = parse(methods[method], [str(word) for word in (*inputs, *sizes, *words)])
        if stop_after is not None:
            at = (stop_after, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with extra_sinks(*([AfterStep(*at)] if at else [])):
            with pytest.raises(SystemExit) if stop_after is not None else nullcontext() as ended:
                command.main(settings)
        assert stop_after is None or ended.value.code == 143
        return out

    return run


def tune(method: str, base: Path, data: Path, out: Path, *, train=None, **settings) -> None:
    """A short run of finetune/{method}.py in this process."""
    spec = importlib.util.spec_from_file_location(f"finetune_{method}", REPO / f"finetune/{method}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    train = TrainConfig(
        **{"max_steps": 6, "max_seq_length": 64, "save_interval": 0, "learning_rate": 3e-3, **(train or {})}
    )
    kind = {"lora": FinetuneLoRA, "full": FinetuneFull}[method]
    source = JSON(path=str(data), val_fraction=0.2)
    module.main(
        kind(
            checkpoint_dir=str(base),
            data=source,
            out_dir=str(out),
            prompt_style="plain",
            accelerator="cpu",
            train=train,
            **settings,
        )
    )


def command(
    *words: object, cwd: Path = REPO, input: str = "", timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess:
    """Run `python FOLDER/NAME.py ...` of this repository as a user does.

    Where it can be, in a fork of a process that has imported everything: as a process of its own, it
    would import torch for a second or two.
    """
    if "PYTHONPATH" not in environment and "--devices" not in words:
        limits = {"seconds": int(timeout), "memory": 2**34}
        done = server().run(*words, cwd=cwd, input=input, environment=environment, **limits)
        return subprocess.CompletedProcess(words, done["status"], done["stdout"], done["stderr"])
    script, *arguments = map(str, words)
    return subprocess.run(
        [sys.executable, str(REPO / script), *arguments],
        cwd=cwd,
        input=input,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={"OMP_NUM_THREADS": "2", **os.environ, **environment},
    )


def succeeds(*words: object, **options) -> subprocess.CompletedProcess:
    done = command(*words, **options)
    assert done.returncode == 0, done.stderr
    return done


def fails(*words: object, **options) -> str:
    """The one line of a user's mistake: status 2, nothing but `error: ...` on stderr."""
    done = command(*words, **options)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


class Forked:
    """Runs commands in forks of one process (tests/forked.py), within limits of memory and time."""

    def __init__(self, *modules: str, **environment: str) -> None:
        """`modules` as for tests/forked.py."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **environment,
        }
        program = [sys.executable, str(REPO / "tests/forked.py"), *modules]
        self._process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == '"ready"\n'

    def run(self, *words: object, cwd: Path, **more: Any) -> dict:
        """{"status", "stdout", "stderr"} of a command; `more` are `input`, `environment`, and the
        limits `seconds` and `memory`, where the usual ones are not enough."""
        asked = {"words": list(map(str, words)), "cwd": str(cwd), **more}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def succeeds(self, *words: object, cwd: Path) -> str:
        """What a command that must succeed prints."""
        done = self.run(*words, cwd=cwd)
        assert done["status"] == 0, done
        return done["stdout"]

    def refuses(self, *words: object, cwd: Path) -> str:
        """The one line of a command that must refuse, with status 2, and change nothing below
        `cwd`."""
        before = snapshot(cwd)
        done = self.run(*words, cwd=cwd)
        assert done["status"] == 2, done
        line = done["stderr"]
        assert line.startswith("error: ") and line.count("\n") == 1 and line.endswith("\n"), line
        assert line[:-1].isprintable(), "what a file says must not steer the terminal"
        assert len(line) < 3000
        assert snapshot(cwd) == before, "a mistake must change nothing on the disk"
        return line

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def snapshot(directory: Path) -> dict[str, object]:
    """What is in a directory: links by where they lead, files by time and content."""

    def what(path: Path) -> object:
        if path.is_symlink():
            return os.readlink(path)
        facts = path.stat()
        return (
            None
            if not path.is_file()  # a pipe cannot be read
            else (facts.st_size, facts.st_mtime_ns, path.read_bytes() if facts.st_size < 2**22 else b"")
        )

    return {str(path): what(path) for path in sorted(directory.rglob("*"))}


_servers: list[Forked] = []


def server() -> Forked:
    """The one that all tests of this process share."""
    if not _servers:
        _servers.append(Forked())
    return _servers[0]


@pytest.fixture(scope="session", autouse=True)
def _close_server():
    yield
    while _servers:
        _servers.pop().close()


@pytest.fixture(scope="session")
def forked():
    return server()
