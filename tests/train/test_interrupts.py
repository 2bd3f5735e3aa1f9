"""What ends or disturbs a run: signals, the time limit, too little memory, steps that are not
finite. Nothing of it loses the run."""

import csv
import fcntl
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import termios

import pytest
import torch
from conftest import REPO, succeeds, tiny_config
from test_fit import examples, train

from litlora.checkpoint import open_checkpoint
from litlora.errors import UserError
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT
from litlora.report.metrics import Metrics
from litlora.train.interrupts import Interrupts, Stop
from litlora.train.parallel import Parallel
from litlora.train.run_directory import step_directories

WORDS = [
    "--train.max_steps",
    "6",
    "--train.log_interval",
    "1",
    "--lora.dropout",
    "0.2",
    "--data.max_examples",
    "120",
    "--accelerator",
    "cpu",
]


def signalled(out, *signals, words=(), after=r"step 2/"):
    """(exit status, stdout, stderr) of a run that gets a signal once a line of its output matches,
    and the others at once after it."""
    process = subprocess.Popen(
        [sys.executable, str(REPO / "finetune/lora.py"), "--out_dir", str(out), *WORDS, *map(str, words)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said = ""
    for line in process.stdout:
        said += line
        if re.match(after, line):
            process.send_signal(signals[0])
            break
    for number in signals[1:]:
        assert "stopping after this step" in process.stderr.readline() + process.stderr.readline()
        process.send_signal(number)
    rest, errors = process.communicate(timeout=120)
    return process.returncode, said + rest, errors


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    succeeds("finetune/lora.py", "--out_dir", out, *WORDS)
    return (out / "final/lit_model.pth").read_bytes()


@pytest.mark.parametrize(
    ("number", "status"),
    [pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow), (signal.SIGTERM, 143)],
)
def test_a_signal_saves_and_the_printed_command_goes_on(tmp_path, expected, number, status):
    out = tmp_path / "out"
    code, said, errors = signalled(out, number)
    assert code == status, (code, said, errors)
    assert errors == f"\n{number.name}: stopping after this step; once more ends at once\n"
    (step,) = step_directories(out)
    assert (
        f"stopped by {number.name} after step {int(step.name[5:])}; the newest checkpoint is {step}" in said
    )
    assert open_checkpoint(step).kind == "adapter" and not (out / "final").exists()
    command = shlex.split(said.partition("\nresume: ")[2])
    assert command[0] == "python"
    succeeds(*command[1:])
    assert (out / "final/lit_model.pth").read_bytes() == expected


@pytest.mark.slow
def test_a_terminal_that_closes_loses_nothing(tmp_path):
    out = tmp_path / "out"
    terminal, side = pty.openpty()
    termios.tcsetwinsize(side, (24, 80))

    def in_a_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup

    process = subprocess.Popen(
        [
            sys.executable,
            str(REPO / "finetune/lora.py"),
            "--out_dir",
            str(out),
            *WORDS,
            "--train.max_steps=500",
        ],
        cwd=REPO,
        stdin=side,
        stdout=side,
        stderr=side,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=in_a_terminal,
    )
    os.close(side)
    said = b""
    while not re.search(rb" [1-9][0-9]*/500", said):
        said += os.read(terminal, 1000)
    os.close(terminal)
    assert process.wait(timeout=60) == 129
    (step,) = step_directories(out)
    assert open_checkpoint(step).kind == "adapter" and (step / "state.pth").is_file()


def test_under_nohup_a_hangup_is_ignored():
    code = (
        "import os, signal; from litlora.train.interrupts import Interrupts\n"
        "with Interrupts() as interrupts:\n"
        "    os.kill(os.getpid(), signal.SIGHUP); print('still here')"
    )
    ignoring = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **ignoring
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "still here\n", "")


@pytest.mark.slow
def test_two_devices_stop_together_and_resume_to_the_same_result(tmp_path):
    """Only the first process is signalled; every rank's generators come back, or dropout would
    differ."""
    two = ["--devices", "2"]
    succeeds("finetune/lora.py", "--out_dir", tmp_path / "whole", *WORDS, *two, OMP_NUM_THREADS="1")
    out = tmp_path / "out"
    code, said, errors = signalled(out, signal.SIGTERM, words=two)
    assert code == 143 and said.count("stopped by SIGTERM") == 1, (code, said, errors)
    succeeds("finetune/lora.py", "--out_dir", out, *WORDS, *two, "--resume", "auto", OMP_NUM_THREADS="1")
    assert (out / "final/lit_model.pth").read_bytes() == (tmp_path / "whole/final/lit_model.pth").read_bytes()


def test_a_second_signal_ends_at_once():
    """In a step that would never end."""
    code = (
        "import os, signal, time; from litlora.train.interrupts import Interrupts\n"
        "with Interrupts():\n"
        "    os.kill(os.getpid(), signal.SIGINT); print('still here', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(100)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 143 and done.stdout == "still here\n" and "once more ends at once" in done.stderr
    )


def test_the_former_handlers_come_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_in_a_validation_does_not_wait_for_its_end(tmp_path):
    """The validation is given up, and is done first when the run goes on."""
    model, states, calls = GPT(tiny_config()), [], []
    data, val = examples(4), examples(6, seed=1)

    def count(*_):
        calls.append(model.training)
        if calls.count(False) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = model.model.register_forward_pre_hook(count)
    sizes = {"micro_batch_size": 1, "global_batch_size": 1, "eval_interval": 2, "val": val}
    with Interrupts() as interrupts:
        done = train(
            model,
            data,
            tmp_path,
            save=lambda directory, state: states.append(state),
            interrupts=interrupts,
            **sizes,
        )
    hook.remove()
    assert done.stopped is Stop.SIGTERM and done.steps == 2 and calls.count(False) == 2, (
        "four validation batches are left out"
    )
    (state,) = states
    assert (
        state["position"]["validation_due"] and state["position"]["val_loss"] is None and model.model.training
    )


def test_the_time_limit_stops_with_status_0(tmp_path):
    done = succeeds(
        "finetune/lora.py",
        "--out_dir",
        tmp_path / "out",
        *WORDS,
        "--train.max_time",
        1e-4,
    )
    assert (
        "stopped by max_time after step 1; the newest checkpoint is" in done.stdout
        and "--resume auto" in done.stdout
    )
    assert [path.name for path in step_directories(tmp_path / "out")] == ["step-000001"]


def test_where_devices_disagree_all_stop():
    class Two(Parallel):
        def largest(self, number):
            return max(number, int(Stop.SIGTERM))

    assert Interrupts().asked(Two("cpu")) is Stop.SIGTERM
    assert Interrupts().asked(Parallel("cpu")) is None


# ---- too little memory


def test_the_processors_own_lack_of_memory_says_what_to_turn_down(tmp_path):
    """A real failure of the allocator."""
    model = GPT(tiny_config())
    model.model.register_forward_pre_hook(lambda *_: torch.empty(2**60))
    with pytest.raises(
        UserError, match=r"out of memory at a micro-batch of 2 examples with \d+ tokens, the longest \d+: "
    ) as raised:
        train(
            model,
            examples(4),
            tmp_path,
            packing=False,
            micro_batch_size=2,
            global_batch_size=4,
            max_seq_length=64,
        )
    said = str(raised.value)
    assert (
        "lower micro_batch_size (2) or max_seq_length (64); can't allocate memory" in said
        and "\n" not in said
    )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), MemoryError()],
)
@pytest.mark.parametrize("training", [True, False])
def test_a_lack_of_memory_anywhere_is_one_line(tmp_path, error, training):
    model = GPT(tiny_config())

    def fail(*_):
        if model.training == training:
            raise error

    model.model.register_forward_pre_hook(fail)
    with pytest.raises(
        UserError,
        match=r"out of memory at a micro-batch of 3 examples with .*"
        r"(CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0|MemoryError)",
    ):
        train(model, examples(6), tmp_path, val=examples(5), micro_batch_size=3, global_batch_size=3)


def test_another_error_stays_what_it_is(tmp_path):
    model = GPT(tiny_config())
    model.model.register_forward_pre_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        train(model, examples(4), tmp_path)


# ---- steps that are not finite


class Disturbed(GPT):
    """A model whose answers in some forward passes are not numbers, or whose gradient is not."""

    def __init__(self, bad, how="loss"):
        super().__init__(tiny_config())
        self.count, self.bad, self.how = 0, bad, how
        add_lora(self, LoRAConfig(rank=2))
        self.model.register_forward_hook(self.disturb)

    def disturb(self, _, __, hidden):
        self.count += self.training
        if self.training and self.count in self.bad:
            if self.how == "loss":
                return hidden * torch.nan
            hidden.register_hook(lambda gradient: gradient * torch.inf)
        return hidden


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_bad_step_changes_nothing_and_is_counted(tmp_path, capsys, how):
    """Weights and optimizer before and after it are the same; the mean loss that is logged leaves
    it out."""
    torch.manual_seed(0)
    model, states = Disturbed({3, 5}, how), []
    metrics = Metrics(tmp_path / "metrics.csv")
    sizes = {
        "micro_batch_size": 1,
        "global_batch_size": 1,
        "log_interval": 2,
        "save_interval": 1,
        "sinks": [metrics],
    }

    def keep(directory, state):
        states.append({name: tensor.clone() for name, tensor in state["weights"].items()})
        states.append(
            {(i, k): v.clone() for i, slot in state["optimizer"]["state"].items() for k, v in slot.items()}
        )

    done = train(model, examples(6), tmp_path, save=keep, **sizes)
    assert done.skipped == 2 and done.steps == 6 and done.loss > 0
    assert len(states) == 2 * 3, (
        "early checkpoints of steps 1, 2, 4: none in the middle of bad ones, the last is for final/"
    )
    said = capsys.readouterr().out
    assert (
        "step 3/6 | skipped, as its loss or gradient is not finite: 1 in a row, 1 in all" in said
        and "1 in a row, 2 in all" in said
    )
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["step"], row["skipped"]) for row in rows] == [("1", "0"), ("2", "0"), ("4", "1"), ("6", "2")]
    assert all(0 < float(row["loss"]) < 100 for row in rows)
    steps = [state[(0, "step")].item() for state in states[1::2]]
    assert steps == [1, 2, 3], "AdamW has not seen the bad step"


def test_too_many_bad_steps_stop_with_the_last_good_weights_saved(tmp_path):
    model, saved = Disturbed({3, 5, 6, 7}), {}

    def keep(directory, state):
        saved[directory.name] = {name: tensor.clone() for name, tensor in state["weights"].items()}

    sizes = {"micro_batch_size": 1, "global_batch_size": 1, "save_interval": 4, "max_bad_steps": 2}
    says = (
        r"3 steps in a row had a loss or a gradient that is not finite.*stopped after step 7; "
        r".*step-000007; lower learning_rate"
    )
    with pytest.raises(UserError, match=says):
        train(model, examples(12), tmp_path, save=keep, **sizes)
    assert list(saved) == ["step-000004", "step-000007"]
    assert all(
        torch.equal(saved["step-000004"][name], tensor) for name, tensor in saved["step-000007"].items()
    ), "4 was the last good one"


def test_a_base_that_never_gives_a_number_leaves_nothing_behind(tmp_path):
    model, saved = GPT(tiny_config()), []
    add_lora(model, LoRAConfig(rank=2))
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(
        UserError, match="6 steps in a row had a loss.*nothing was saved.*broken weights in the base"
    ):
        train(
            model,
            examples(),
            tmp_path,
            save=lambda *done: saved.append(done),
            micro_batch_size=2,
            global_batch_size=2,
        )
    assert not saved and all(
        torch.equal(p, before[name]) for name, p in model.named_parameters() if p.requires_grad
    )
