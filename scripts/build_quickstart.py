"""Build the quickstart model and the built-in sample from `scripts/quickstart_facts.py` alone.
Seeded.

    python scripts/build_quickstart.py                  # everything: tokenizer, base model, samples
    python scripts/build_quickstart.py --sample_only    # the two sample files only, in a second

It writes

- `checkpoints/litlora/quickstart/`: a small Llama-type model, trained from scratch on plain
  statements of facts. It has never read a question or an instruction, so it does not answer any:
  fine-tuning teaches it to;
- `litlora/data/alpaca_sample.json`: Alpaca records that ask for such facts, for training;
- `litlora/data/alpaca_sample_heldout.json`: records about entities that the training file never asks
  about. The base has read statements about them; only a fine-tuned model that can use the base's
  knowledge answers these.

The tokenizer (byte-level BPE) is trained on the statements and on the words of the instructions and
the Alpaca prompt, so that prompts stay short. A tokenizer holds no facts, and the weights never see
those words as prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from quickstart_facts import INSTRUCTIONS, Fact, Facts, record

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT_DIR = ROOT / "checkpoints" / "litlora" / "quickstart"
SAMPLE_FILE = ROOT / "litlora" / "data" / "alpaca_sample.json"
HELDOUT_FILE = ROOT / "litlora" / "data" / "alpaca_sample_heldout.json"

END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 2048
SEED = 1337

SPLIT_SEED = 2026
HELDOUT_SHARE = 0.13
ALWAYS_HELD_OUT = ("country France", "word mouse", "pair 7 8")  # what the documentation shows
WORDINGS_PER_FACT = 3.2
"""Mean number of wordings in which the training sample asks for a fact, if the fact has that
many."""
HELDOUT_RECORDS = 400

ARCHITECTURE = {
    "hidden_size": 192,
    "intermediate_size": 480,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the base model is trained."""

    steps: int = 2200
    batch_size: int = 16
    length: int = 256
    """Tokens in a row. A row has several documents, so that the model learns to ignore what comes
    before an end-of-text token."""
    warmup: int = 100
    muon_learning_rate: float = 0.02
    """Peak learning rate of the matrices inside the blocks."""
    adamw_learning_rate: float = 3e-3
    """Peak learning rate of the embedding and the norms."""


# ---- the samples


def heldout_entities(facts: Facts) -> frozenset[str]:
    """The entities that the training sample never asks about: a seeded share of each kind, and
    ALWAYS_HELD_OUT."""
    rng = random.Random(SPLIT_SEED)
    kinds: dict[str, list[str]] = {}
    for entity in facts.entities:
        kinds.setdefault(entity.split()[0], []).append(entity)
    held = set(ALWAYS_HELD_OUT)
    for entities in kinds.values():
        held.update(rng.sample(entities, round(HELDOUT_SHARE * len(entities))))
    return frozenset(held)


def make_samples(facts: Facts) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training records, held-out records). No entity is in both."""
    rng = random.Random(SPLIT_SEED + 1)
    held = heldout_entities(facts)

    def ask(fact: Fact, count: int) -> list[dict[str, str]]:
        return [
            record(fact, *wording)
            for wording in rng.sample(
                INSTRUCTIONS[fact.relation], min(count, len(INSTRUCTIONS[fact.relation]))
            )
        ]

    train, heldout = [], []
    for fact in (fact for fact in facts.all if fact.relation in INSTRUCTIONS):
        if fact.entity in held:
            heldout += ask(fact, 2)
        else:
            train += ask(fact, int(WORDINGS_PER_FACT) + (rng.random() < WORDINGS_PER_FACT % 1))
    rng.shuffle(train)
    rng.shuffle(heldout)
    return train, heldout[:HELDOUT_RECORDS]


def write_samples(facts: Facts) -> None:
    for path, records in zip((SAMPLE_FILE, HELDOUT_FILE), make_samples(facts), strict=True):
        path.write_text(sample_text(records), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {len(records)} records")


def sample_text(records: list[dict[str, str]]) -> str:
    """A JSON list, one record a line."""
    return "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False) for r in records) + "\n]\n"


# ---- the base model


def documents(facts: Facts, seed: int) -> Iterator[str]:
    """Endless documents of plain statements."""
    rng = random.Random(seed)
    while True:
        yield facts.document(rng)


def train_tokenizer(facts: Facts, directory: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from litlora.prompts import STYLES

    stream = documents(facts, SEED + 2)
    texts = [next(stream) for _ in range(20_000)]
    blank = dict.fromkeys(("x", "y", "a", "b", "ax", "ay", "thing"), "")
    wordings = [instruction.format(**blank) for group in INSTRUCTIONS.values() for instruction, _, _ in group]
    prompts = [STYLES["alpaca"].render("", text) for text in ("", " ")]
    texts += (wordings + 20 * prompts) * 10
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    settings = {
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def packed_batches(facts: Facts, tokenizer, batch_size: int, length: int) -> Iterator:
    """Endless (B, T + 1) batches of token ids: packed documents, each after an end-of-text token."""
    import torch

    end = tokenizer.token_to_id(END_OF_TEXT)
    stream = documents(facts, SEED + 3)
    ids: list[int] = []
    size = batch_size * (length + 1)
    while True:
        while len(ids) < size:
            for encoding in tokenizer.encode_batch([next(stream) for _ in range(2000)]):
                ids += [*encoding.ids, end]
        yield torch.tensor(ids[:size]).view(batch_size, length + 1)
        ids = ids[size:]


def initialise(model) -> None:
    """Normal weights of standard deviation 1/sqrt(fan-in), smaller with depth for those that write to
    the residual stream."""
    import torch

    depth = model.config.num_hidden_layers
    for name, weight in model.named_parameters():
        if name.endswith("embed_tokens.weight"):
            torch.nn.init.normal_(weight, std=0.02)
        elif weight.ndim == 2:
            scale = 1 / math.sqrt(2 * depth) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            torch.nn.init.normal_(weight, std=scale / math.sqrt(weight.shape[1]))


def train_base(facts: Facts, directory: Path, plan: Plan) -> None:
    """Train the model from scratch and write a full checkpoint into `directory`, which has its
    tokenizer."""
    import torch
    import torch.nn.functional as F
    from tokenizers import Tokenizer

    from litlora.checkpoint import write_full
    from litlora.config import ModelConfig
    from litlora.model import GPT

    torch.manual_seed(SEED)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = ModelConfig(vocab_size=tokenizer.get_vocab_size(), **ARCHITECTURE)
    model = GPT(config)
    initialise(model)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    # Muon (Jordan et al. 2024) for the matrices inside the blocks learns rare facts in far fewer
    # steps than AdamW.
    matrices = [p for name, p in model.named_parameters() if name.endswith("_proj.weight")]
    others = [p for name, p in model.named_parameters() if not name.endswith("_proj.weight")]
    optimizers = [
        (torch.optim.Muon(matrices, momentum=0.95, weight_decay=0.0), plan.muon_learning_rate),
        (torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0), plan.adamw_learning_rate),
    ]
    batches = packed_batches(facts, tokenizer, plan.batch_size, plan.length)
    start = time.perf_counter()
    for step in range(plan.steps):
        warmup, decay = min(1.0, (step + 1) / plan.warmup), 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = peak * warmup * (0.02 + 0.98 * decay)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        if step % 100 == 0 or step == plan.steps - 1:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    write_full(directory, dict(model.named_parameters()), config, sidecars_from=[directory])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample_only", action="store_true", help="write the two sample files only")
    parser.add_argument(
        "--checkpoint_dir", type=Path, default=CHECKPOINT_DIR, help="where the base model goes"
    )
    parser.add_argument("--steps", type=int, default=Plan.steps, help="training steps of the base model")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads that train")
    args = parser.parse_args()
    facts = Facts()
    write_samples(facts)
    if args.sample_only:
        return
    import torch

    torch.set_num_threads(args.threads)
    args.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    train_tokenizer(facts, args.checkpoint_dir)
    train_base(facts, args.checkpoint_dir, Plan(steps=args.steps))
    print(
        f"{args.checkpoint_dir}: {sum(path.stat().st_size for path in args.checkpoint_dir.iterdir()):,} bytes"
    )


if __name__ == "__main__":
    main()
