r"""Tokens a second over HTTP: our server beside LitGPT's, and beside a plain loop of transformers.

    python benchmarks/serve_speed.py --hf W/hf --litgpt_dir W/lit --peers PEERS/bin --clients 1 8 64

W is what the driver of `peer_rows.py` creates: one Llama as a Hugging Face folder and in LitGPT's
layout. Every server is a process of its own and gets the same prompts from so many clients at once,
each client one request after the other; all answer greedily and to the full number of tokens, in
fp32. The loop is a transformers process that answers one prompt after the other. They take turns,
one round after the other; every round prints a line.

With `--requests N --memory`, our server alone is asked N times by 64 clients, of which some leave in the
middle of an answer, and its resident memory is printed on the way.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
WORDS = (
    "the red fox counts three small boats near an old stone bridge while rain falls on quiet fields".split()
)
LOOP = """
import json, sys, time, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
place, count = sys.argv[1], int(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(place)
model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
def answer(prompt):
    ids = tokenizer(prompt, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**ids, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return made.shape[1] - ids["input_ids"].shape[1]
answer("warm up")
print("READY", flush=True)
for line in sys.stdin:
    started = time.perf_counter()
    made = sum(map(answer, json.loads(line)))
    print(json.dumps([made, time.perf_counter() - started]), flush=True)
"""


def prompts(count: int, seed: int) -> list[str]:
    """Different texts, of 10 to 60 words."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(10, 60))) for _ in range(count)]


def post(url: str, body: dict) -> dict:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=900) as answer:
        return json.loads(answer.read())


def wait_for(url: str, process: subprocess.Popen) -> None:
    for _ in range(600):
        if process.poll() is not None:
            sys.exit(f"{url}: the server ended with status {process.returncode}")
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            time.sleep(0.5)
    sys.exit(f"{url}: does not answer")


@contextmanager
def ours(options: argparse.Namespace):
    """Our server; yields what asks it for one answer and returns its number of tokens."""
    words = [sys.executable, str(REPO / "chat/serve.py"), "--checkpoint_dir", str(options.hf)]
    words += ["--port", "8101", "--accelerator", "cpu", "--prompt_style", "plain", "--batch_size", "64"]
    words += ["--cache_tokens", str(options.cache_tokens)] if options.cache_tokens else []
    words += ["--max_requests", "128", "--max_answer_tokens", str(options.new_tokens)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    try:
        wait_for("http://127.0.0.1:8101/health", process)
        fixed = {"model": options.hf.name, "max_tokens": options.new_tokens, "temperature": 0}

        def ask(prompt: str) -> int:
            answer = post("http://127.0.0.1:8101/v1/completions", fixed | {"prompt": prompt})
            return answer["usage"]["completion_tokens"]

        ask.process = process
        yield ask
    finally:
        process.terminate()
        process.wait()


@contextmanager
def litgpt(options: argparse.Namespace):
    """LitGPT's server, which says the text alone: the same weights give as many tokens as ours counts."""
    words = [str(options.peers / "litgpt"), "serve", str(options.litgpt_dir), "--port", "8102"]
    words += ["--accelerator", "cpu", "--devices", "1", "--precision", "32-true", "--temperature", "0"]
    words += ["--top_k", "1", "--timeout", "900", "--max_new_tokens", str(options.new_tokens)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(
        words,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )
    try:
        wait_for("http://127.0.0.1:8102/health", process)

        def ask(prompt: str) -> int:
            assert post("http://127.0.0.1:8102/predict", {"prompt": prompt})["output"]
            return options.new_tokens

        yield ask
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its workers outlive it
        process.wait()


def served(ask, texts: list[str], clients: int) -> tuple[int, float]:
    """Tokens of all answers, and seconds."""
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(pool.map(ask, texts))
    return made, time.perf_counter() - started


def compare(options: argparse.Namespace) -> None:
    loop_words = [str(options.peers / "python"), "-c", LOOP, str(options.hf), str(options.new_tokens)]
    loop = subprocess.Popen(loop_words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert loop.stdout.readline() == "READY\n"
    with ours(options) as ask_ours, litgpt(options) as ask_litgpt:
        for ask in (ask_ours, ask_litgpt):
            ask("warm up")
        for number in range(options.rounds):
            for clients in options.clients:
                texts = prompts(max(8, clients), seed=100 * number + clients)
                for name, ask in (("ours", ask_ours), ("litgpt serve", ask_litgpt)):
                    tell(name, number, clients, *served(ask, texts, clients))
            texts = prompts(8, seed=100 * number + 1)
            print(json.dumps(texts), file=loop.stdin, flush=True)
            tell("transformers loop", number, 1, *json.loads(loop.stdout.readline()))
    loop.terminate()


def tell(name: str, number: int, clients: int, made: int, seconds: float) -> None:
    rate = made / seconds
    print(
        f"round {number} | {name} | {clients} at once | {made} tokens in {seconds:.2f} s | {rate:.1f}",
        flush=True,
    )


def resident(process: subprocess.Popen) -> float:
    """MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def watch(options: argparse.Namespace) -> None:
    import http.client

    def leave(prompt: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", 8101)
        body = {"model": options.hf.name, "prompt": prompt, "stream": True, "max_tokens": options.new_tokens}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        connection.getresponse().read(40)
        connection.close()
        return 0

    with ours(options) as ask:
        step, done = max(1, options.requests // 10), 0
        while done < options.requests:
            texts = prompts(step, seed=done)
            work = [(leave if index % 10 == 9 else ask, text) for index, text in enumerate(texts)]
            with ThreadPoolExecutor(64) as pool:
                list(pool.map(lambda pair: pair[0](pair[1]), work))  # raises for one that is not answered
            done += step
            print(f"{done} requests | {resident(ask.process):.1f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", type=Path, required=True)
    parser.add_argument("--litgpt_dir", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--cache_tokens", type=int, help="as of chat/serve.py")
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if not options.memory and not (options.litgpt_dir and options.peers):
        parser.error("--litgpt_dir and --peers name what is measured beside ours; without them: --memory")
    watch(options) if options.memory else compare(options)


if __name__ == "__main__":
    main()
