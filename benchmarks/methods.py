"""What each method is worth: every way to fine-tune, on the quickstart base, at its own best
learning rate.

    python benchmarks/methods.py --alpaca alpaca.json
    python benchmarks/methods.py --page

The first form trains (some two hours on two cores; it goes on where it was stopped), keeps the
figures in benchmarks/methods.json and writes docs/methods.md. The second only writes the page from
the figures. `--alpaca` names a file of Alpaca's records, of which 900 are trained on.

Every run is one of the repository's commands in a process of its own. A method is trained at a
third, once and three times the rate of its row, and further where the best of them lies at the edge; at
the best one with two seeds more. The losses are measured by
one function for all, on records that no run has seen. Speed and memory are measured apart from the
losses, one run at a time, interleaved: `--jobs` does not touch them.
"""

import argparse
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
FIGURES = ROOT / "benchmarks/methods.json"
SAMPLE = ROOT / "litlora/data/alpaca_sample.json"
HELD_OUT = ROOT / "litlora/data/alpaca_sample_heldout.json"
TOOLS = ("finetune/lora.py", "finetune/full.py", "finetune/dpo.py", "finetune/distill.py")
LORA, FULL, DPO, DISTILL = TOOLS
SEEDS = (1, 2, 3)
TIMED_ROUNDS, TIMED_STEPS = 3, 20
MAX_NEW_TOKENS = 48
NUM_PAIRS = 400


@dataclass(frozen=True)
class Method:
    """One row: a command, and the settings that make it this method."""

    name: str
    settings: tuple[str, ...] = ()
    command: str = LORA
    rate: float = 3.1e-3
    """The middle of the grid of learning rates."""

    @property
    def folder(self) -> str:
        return re.sub(r"\W+", "-", self.name)

    def arguments(self, rate: float, seed: int) -> list[str]:
        return [*self.settings, "--train.learning_rate", f"{rate:.2e}", "--seed", str(seed)]


@dataclass(frozen=True)
class Task:
    """What the methods are trained on."""

    name: str
    title: str
    steps: int
    settings: tuple[str, ...]
    asks: bool
    """Whether the answers are compared letter by letter."""
    timed: bool = True
    """Whether speed and memory are measured."""
    by_answers: bool = False
    """Whether the best rate is that of the most right answers, not of the lowest loss: what one
    prefers is not what one predicts."""


TUNING = (
    Method("full fine-tuning", (), FULL, 3.1e-4),
    Method("lora (the default)"),
    Method("lora, qv only", ("--lora.targets", "qv")),
    Method("lora, rank 64", ("--lora.rank", "64")),
    Method("rsLoRA, rank 64", ("--lora.rank", "64", "--lora.rslora", "true")),
    Method("DoRA", ("--lora.variant", "dora")),
    Method("LoRA+, ratio 4", ("--train.loraplus_lr_ratio", "4")),
    Method("gaussian", ("--lora.init", "gaussian")),
    Method("PiSSA", ("--lora.init", "pissa_niter_16")),
    Method("OLoRA", ("--lora.init", "olora")),
    Method("EVA", ("--lora.init", "eva")),
    Method("NEFTune, alpha 5", ("--train.neftune_alpha", "5")),
    Method("QLoRA, nf4", ("--quantize", "nf4")),
    Method("QLoRA, nf4, LoftQ", ("--quantize", "nf4", "--lora.init", "loftq")),
    Method("QLoRA, int8", ("--quantize", "int8")),
    Method("QLoRA, fp8", ("--quantize", "fp8")),
    Method("distillation", ("--teacher", "{teacher}"), DISTILL),
)
PREFERENCES = tuple(
    Method(loss, ("--preference.loss", loss, "--checkpoint_dir", "{tuned}"), DPO, 9.4e-4)
    for loss in ("dpo", "ipo", "simpo", "orpo", "kto", "apo_zero_unpaired")
)
FEW = ("--data.max_examples", "700")
QUICKSTART = Task("quickstart", "The built-in sample", 40, ("--data", "{sample}", *FEW), True)
ALPACA = Task(
    "alpaca",
    "Alpaca",
    25,
    ("--data", "{alpaca}", "--train.max_seq_length", "128", "--train.global_batch_size", "8"),
    False,
    timed=False,
)
PAIRS = Task("pairs", "Pairs of answers", 20, ("--data", "{pairs}"), True, by_answers=True)
TABLES = ((QUICKSTART, TUNING), (ALPACA, TUNING), (PAIRS, PREFERENCES))


# ---- the runs


class Bench:
    """Runs and their figures, in a directory that is kept, so that nothing is done twice."""

    def __init__(self, directory: Path, alpaca: Path, jobs: int) -> None:
        self.directory, self.jobs = directory, jobs
        directory.mkdir(parents=True, exist_ok=True)
        self.places = {
            "sample": SAMPLE,
            "alpaca": directory / "alpaca.json",
            "pairs": directory / "pairs.json",
            "teacher": directory / "teacher/final",
            "tuned": directory / "tuned/final",
        }
        records = json.loads(alpaca.read_text(encoding="utf-8"))
        self.held_out = {"quickstart": json.loads(HELD_OUT.read_text(encoding="utf-8"))[:100]}
        self.held_out["pairs"] = self.held_out["quickstart"]
        self.held_out["alpaca"] = records[900:1000]
        self.places["alpaca"].write_text(json.dumps(records[:900]), encoding="utf-8")
        sample = json.loads(SAMPLE.read_text(encoding="utf-8"))
        self.places["pairs"].write_text(json.dumps(pairs(sample)), encoding="utf-8")

    def prepare(self) -> None:
        """The teacher, and the adapter that the preference objectives begin with."""
        for name, command, steps in (("teacher", FULL, 300), ("tuned", LORA, 30)):
            if not self.places[name].exists():
                self.train(command, ["--train.max_steps", str(steps)], self.directory / name)

    def train(self, command: str, arguments: list[str], out_dir: Path) -> dict[str, Any]:
        """Run one of the commands as a user does, on all cores; returns what its closing lines say."""
        words = [sys.executable, *self.words(command, arguments, out_dir)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(words)}: {done.stdout[-500:]}{done.stderr[-2000:]}")
        return said(done.stdout)

    def words(self, command: str, arguments: list[str], out_dir: Path) -> list[str]:
        given = [argument.format(**self.places) for argument in arguments]
        fixed = ["--precision", "32-true", "--train.save_interval", "0", "--overwrite"]
        return [command, *given, *fixed, "--out_dir", str(out_dir)]

    def run(self, task: Task, method: Method, rate: float, seed: int) -> dict[str, Any]:
        """The figures of one run, trained if it has none yet."""
        place = self.place(task, method, rate, seed)
        steps = ["--train.max_steps", str(task.steps), "--data.val_fraction", "0"]
        arguments = [*task.settings, *steps, *method.arguments(rate, seed)]

        def measured() -> dict[str, Any]:
            text = printed_by(self.words(method.command, arguments, place))
            loss = held_out_loss(place / "final", self.held_out[task.name])
            size = (place / "final/lit_model.pth").stat().st_size
            print(f"{task.name} | {method.name} | {rate:.1e} | seed {seed} | {loss:.4f}", flush=True)
            return {**said(text), "loss": loss, "bytes": size}

        return in_fork(measured, place.with_name(f"{place.name}.json"))

    def score(self, task: Task, method: Method, rate: float) -> float:
        """What is compared between rates; less is better."""
        loss = self.run(task, method, rate, SEEDS[0])["loss"]
        return -self.exact(task, method, rate, SEEDS[0]) if task.by_answers else loss

    def exact(self, task: Task, method: Method, rate: float, seed: int) -> float:
        """The share of answers of a run that are right to the letter."""
        place = self.place(task, method, rate, seed)
        records = self.held_out[task.name]
        return in_fork(
            lambda: exact_match(place / "final", records), place.with_name(f"{place.name}-exact.json")
        )

    def place(self, task: Task, method: Method, rate: float, seed: int) -> Path:
        return self.directory / task.name / method.folder / f"{rate:.2e}-{seed}"

    def best(self, task: Task, method: Method) -> dict[str, Any]:
        """A row of the page: the best rate of the grid, with all seeds."""
        scores = {
            rate: self.score(task, method, rate) for rate in (method.rate / 3, method.rate, method.rate * 3)
        }
        best = min(scores, key=scores.__getitem__)
        if best in (min(scores), max(scores)):  # at the edge: look further
            further = best / 3 if best == min(scores) else best * 3
            scores[further] = self.score(task, method, further)
            best = min(scores, key=scores.__getitem__)
        runs = [self.run(task, method, best, seed) for seed in SEEDS]
        row = {
            "method": method.name,
            "rate": best,
            "losses": [run["loss"] for run in runs],
            "grid": {f"{rate:.2e}": score for rate, score in sorted(scores.items())},
            "trained": runs[0]["trained"],
            "bytes": runs[0]["bytes"],
        }
        if task.asks:
            row["exact"] = [self.exact(task, method, best, seed) for seed in SEEDS]
        return row

    def speeds(self, task: Task, methods: tuple[Method, ...]) -> dict[str, dict[str, float]]:
        """Tokens a second and peak memory of every method, alone on the machine: medians of
        interleaved rounds."""
        rounds = [[self.timed(task, method, number) for method in methods] for number in range(TIMED_ROUNDS)]
        return {
            method.name: {
                figure: median(run[figure] for run in runs) for figure in ("tokens_per_second", "memory")
            }
            for method, *runs in zip(methods, *rounds, strict=True)
        }

    def timed(self, task: Task, method: Method, number: int) -> dict[str, Any]:
        """The figures of one run of a round, kept as the others are."""
        kept = self.directory / "timed" / task.name / f"{method.folder}-{number}.json"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            steps = ["--train.max_steps", str(TIMED_STEPS), "--data.val_fraction", "0"]
            arguments = [*task.settings, *steps, *method.arguments(method.rate, SEEDS[0])]
            figures = self.train(method.command, arguments, self.directory / "timed/out")
            kept.write_text(json.dumps(figures), encoding="utf-8")
            print(f"{task.name} | {method.name} | {figures['tokens_per_second']:,.0f} tokens/s", flush=True)
        return json.loads(kept.read_text(encoding="utf-8"))


def in_fork(compute: Callable[[], Any], kept: Path) -> Any:
    """What a function returns, computed in a fork on one thread and kept as JSON; read if it is there.
    The fork has all imports, which take as long as a short run."""
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                kept.write_text(json.dumps(compute()), encoding="utf-8")
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(f"{kept}: could not be computed")
    return json.loads(kept.read_text(encoding="utf-8"))


def printed_by(words: list[str]) -> str:
    """What a command prints, run in this process."""
    os.chdir(ROOT)
    sys.argv = words
    printed = io.StringIO()
    with redirect_stdout(printed):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    return printed.getvalue()


def pairs(records: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each question with its answer, and with the answer to the nearest later question that begins
    alike: right in its form, wrong in what it says."""

    def kind(record: dict[str, str]) -> str:
        return " ".join(record["instruction"].split()[:4])

    made = []
    plain = [record for record in records if not record["input"]]
    for index, record in enumerate(plain):
        others = (other for other in plain[index + 1 :] if kind(other) == kind(record))
        wrong = next((other["output"] for other in others if other["output"] != record["output"]), None)
        if wrong is not None:
            made.append({"prompt": record["instruction"], "chosen": record["output"], "rejected": wrong})
    return made[:NUM_PAIRS]


def said(text: str) -> dict[str, Any]:
    """The figures in what a command printed."""
    number = r"([\d,.]+)"
    trained = re.search(rf"{number} train", text)
    last = re.search(rf"steps in .*?, {number} tokens/s, peak memory {number} GiB", text)
    if trained is None or last is None:
        raise SystemExit(f"the closing lines are not what they were: {text[-500:]}")
    figures = (found.replace(",", "") for found in (trained[1], last[1], last[2]))
    return dict(zip(("trained", "tokens_per_second", "memory"), map(float, figures), strict=True))


# ---- what a result is worth


def held_out_loss(directory: Path, records: list[dict[str, str]]) -> float:
    """Cross-entropy of the answers' tokens, their end included: the mean over tokens."""
    import torch
    import torch.nn.functional as F

    from litlora.data.conversation import Conversation, Message, Place
    from litlora.data.examples import tokenize
    from litlora.load import load

    loaded = load(directory, live=None)
    asked = []
    for record in records:
        question = Message("user", record["instruction"], input=record["input"])
        messages = (question, Message("assistant", record["output"], train=True))
        asked.append(Conversation(messages, Place("held out", "record")))
    total = count = 0.0
    for example in tokenize(asked, loaded.tokenizer, loaded.prompt_style, 128).examples:
        ids = torch.tensor(example.ids)
        with torch.inference_mode():
            logits = loaded.model(ids[None])[0].float()
        for start, stop in example.learned:
            total += F.cross_entropy(logits[start - 1 : stop - 1], ids[start:stop], reduction="sum").item()
            count += stop - start
    return total / count


def exact_match(directory: Path, records: list[dict[str, str]]) -> float:
    """Share of the held-out questions answered right to the letter, greedily."""
    from litlora.load import load
    from litlora.serve.engine import Engine
    from litlora.serve.sampling import Sampling

    loaded = load(directory, live=None)
    engine = Engine(loaded.model, owns_model=True)
    right = 0
    for record in records:
        prompt = loaded.prompt_style.render(record["instruction"], record["input"])
        ids = loaded.tokenizer.encode(prompt, begin=True)
        sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS)
        answer = engine.generate(ids, sampling, stop_ids=loaded.tokenizer.stop_ids)
        right += loaded.tokenizer.decode(list(answer)) == record["output"]
    return right / len(records)


# ---- the page

TEMPLATE = ROOT / "benchmarks/methods_page.md"
"""The page without its tables."""
PLACE = "<!-- tables -->"


def page_of(figures: dict[str, Any]) -> str:
    """docs/methods.md: the words that are written by hand, and the tables."""
    tables = [table(task, figures["tables"][task.name]) for task, _ in TABLES]
    return TEMPLATE.read_text(encoding="utf-8").replace(PLACE, "\n\n".join(tables))


def table(task: Task, rows: list[dict[str, Any]]) -> str:
    exact = [" exact match |"] if task.asks else []
    timed = [" tokens/s | memory |"] if task.timed else []
    head = ["| method |", *exact, " loss | spread | rate | trained | file |", *timed]
    lines = [f"### {task.title}, {task.steps} steps", "", "".join(head)]
    lines.append("| --- |" + " ---: |" * (5 + task.asks + 2 * task.timed))
    for row in rows:
        losses = row["losses"]
        cells = [row["method"], f"{mean(losses):.4f}", f"± {(max(losses) - min(losses)) / 2:.4f}"]
        cells += [f"{row['rate']:.1e}", f"{row['trained']:,.0f}", f"{row['bytes'] / 1000:,.0f} KB"]
        cells += [f"{row['tokens_per_second']:,.0f}", f"{row['memory']:.2f}"] if task.timed else []
        if task.asks:
            cells.insert(1, f"{mean(row['exact']):.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measure(bench: Bench) -> dict[str, Any]:
    bench.prepare()
    for name in ("litlora.load", "litlora.train.run"):  # every fork has them
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)  # a process with more threads cannot be forked safely
    with ThreadPoolExecutor(bench.jobs) as pool:
        rows = {
            task.name: [pool.submit(bench.best, task, method) for method in methods]
            for task, methods in TABLES
        }
        losses = {name: [future.result() for future in futures] for name, futures in rows.items()}
    tables = {}
    for task, methods in TABLES:
        speeds = bench.speeds(task, methods) if task.timed else {}
        tables[task.name] = [{**row, **speeds.get(row["method"], {})} for row in losses[task.name]]
    start, records = bench.places["tuned"], bench.held_out["pairs"]
    before = {"loss": held_out_loss(start, records), "exact": exact_match(start, records)}
    return {"before_preference": before, "tables": tables}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--alpaca", type=Path, help="a file of Alpaca's records, at least 1,000")
    parser.add_argument("--out_dir", type=Path, default=ROOT / "out/methods", help="where the runs are kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each on one thread")
    parser.add_argument("--page", action="store_true", help="only write the page from the figures")
    args = parser.parse_args()
    if not args.page:
        if args.alpaca is None:
            parser.error("--alpaca FILE is needed: a file of Alpaca's records")
        figures = measure(Bench(args.out_dir.absolute(), args.alpaca, args.jobs))
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    (ROOT / "docs/methods.md").write_text(page_of(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
