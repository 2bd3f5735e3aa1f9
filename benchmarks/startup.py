"""How long a user waits: for `--help` of every command, compared with `import torch`, and from the
start of training to the end of the first step.

    python benchmarks/startup.py [--rounds 5]

Every command is a process of its own, timed from outside. The rounds are interleaved (A B C A B C
...), and a table shows the medians.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parent.parent


def run(command: list[str], until: str | None = None) -> tuple[float, float]:
    """(seconds, peak MiB) of a process: until its end, or until the first line that matches
    `until`."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPO)
    seconds = None
    for line in process.stdout:
        if until and seconds is None and re.search(until, line):
            seconds = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or (until and seconds is None):
        raise SystemExit(f"{' '.join(command)} failed with status {process.returncode}")
    return seconds or time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds

    folders = ("finetune", "chat", "scripts")
    scripts = [
        path
        for folder in folders
        for path in sorted((REPO / folder).glob("*.py"))
        if "import cli" in path.read_text() or "litlora.cli" in path.read_text()
    ]
    with tempfile.TemporaryDirectory() as scratch:
        out = f"--out_dir={scratch}/run"
        rows = {
            "python -c 'import torch'": ([sys.executable, "-c", "import torch"], None),
            **{
                f"{path.relative_to(REPO)} --help": ([sys.executable, str(path), "--help"], None)
                for path in scripts
            },
            "finetune/lora.py to the end of step 1": (
                [
                    sys.executable,
                    "finetune/lora.py",
                    out,
                    "--overwrite",
                    "--train.max_steps=2",
                    "--train.log_interval=1",
                ],
                r"^step 1/",
            ),
        }
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
        for _ in range(rounds):
            for name, (command, until) in rows.items():
                taken[name].append(run(command, until))
    print("| command | seconds, median [min-max] | peak MiB |\n|---|---|---|")
    for name, results in taken.items():
        seconds = [second for second, _ in results]
        peak = statistics.median(mib for _, mib in results)
        print(
            f"| `{name}` | {statistics.median(seconds):.2f} "
            f"[{min(seconds):.2f}-{max(seconds):.2f}] | {peak:.0f} |"
        )


if __name__ == "__main__":
    main()
