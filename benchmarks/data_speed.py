"""How long large data takes from the start of a run to the end of its first step, and how much
memory all its processes together: tokenised by this run (cold), and found again (warm).

    python benchmarks/data_speed.py --records alpaca.json --megabytes 41 249 [--in_memory]

Makes a file of JSON lines of each size by repeating the records of a list in a .json file, each
with another instruction, in a temporary directory (TMPDIR says where). Resident sets are added up
five times a second, shared pages once for each process. `--in_memory`: without the files on the
disk, as data below 16 MB.
"""

import argparse
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPO = Path(__file__).parent.parent
PAGE = os.sysconf("SC_PAGE_SIZE")


def make(records: list[dict[str, str]], file: Path, num_bytes: int) -> int:
    """Write so many bytes of records; returns the number of records."""
    with file.open("w", encoding="utf-8") as opened:
        for number in itertools.count():
            record = records[number % len(records)]
            record = {**record, "instruction": f"{number}: {record['instruction']}"}
            if opened.write(json.dumps(record, ensure_ascii=False) + "\n") and opened.tell() >= num_bytes:
                return number + 1


class Memory(threading.Thread):
    """Measures the resident sets of a process and of all its descendants."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid = pid
        self.peak = self.peak_processes = 0

    def run(self) -> None:
        while Path(f"/proc/{self._pid}").exists():
            found = self._resident()
            if sum(found) > self.peak:
                self.peak, self.peak_processes = sum(found), len(found)
            time.sleep(0.2)

    def _resident(self) -> list[int]:
        parents, sizes = {}, {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    sizes[int(entry.name)] = int((entry / "statm").read_text().split()[1]) * PAGE
                except OSError:  # it has ended
                    continue
        ours, more = set(), {self._pid}
        while more:
            ours |= more
            more = {pid for pid, parent in parents.items() if parent in more} - ours
        return [sizes[pid] for pid in ours if pid in sizes]


def first_step(words: list[str]) -> tuple[float, Memory]:
    """Seconds to the line about the first step, and the memory until then."""
    command = [sys.executable, str(REPO / "finetune/lora.py"), *words]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO)
    memory = Memory(process.pid)
    memory.start()
    for line in process.stdout:
        print(f"    {line.rstrip()}", flush=True)
        if re.match(r"step 1/", line):
            break
    seconds = time.perf_counter() - started
    process.send_signal(signal.SIGKILL)
    process.wait()
    memory.join()
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, nargs="+", required=True)
    parser.add_argument("--checkpoint_dir", default="checkpoints/litlora/quickstart")
    parser.add_argument("--in_memory", action="store_true")
    arguments = parser.parse_args()
    records = json.loads(arguments.records.read_text(encoding="utf-8"))
    rows = []
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "data.jsonl"
            count = make(records, file, megabytes * 10**6)
            words = [
                f"--checkpoint_dir={arguments.checkpoint_dir}",
                f"--data={file}",
                f"--out_dir={scratch}/run",
                "--overwrite",
                "--train.max_steps=2",
            ]
            words += ["--train.log_interval=1", "--train.save_interval=0", "--accelerator=cpu"]
            words += ["--data.cache=false"] if arguments.in_memory else [f"--data.cache_dir={scratch}/cache"]
            for name in ["in memory"] if arguments.in_memory else ["cold", "warm"]:
                seconds, memory = first_step(words)
                rows.append(
                    f"| {megabytes:,} | {count:,} | {name} | {seconds:,.1f} | "
                    f"{memory.peak / 2**20:,.0f} in {memory.peak_processes} processes |"
                )
                print(rows[-1], flush=True)
    print("\n| MB | records | | s to the first step | peak, MiB |\n| --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
