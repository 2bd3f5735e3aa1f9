"""Makes expected.safetensors: what TRL's trainers say of a tiny model and a few pairs.

    pip install trl==1.16.0 transformers==5.23.0 && python tests/trl_files/make.py

It holds the weights of a policy and of a reference model ("policy.", "reference."), and of each loss
its value, the mean rewards of chosen and rejected answers, and the gradient of every weight of the
policy. The pairs are in its header. ORPO is asked for one pair at a time with a prompt of one token:
TRL takes the prompt into the loss of the chosen answer, of which nothing then remains. Of KTO, whose
examples are labelled, there is the estimate of KL too; its batch is all of them.
"""

import itertools
import json
import tempfile
from pathlib import Path

import datasets.arrow_dataset
import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

CONFIG = {
    "vocab_size": 30,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
PAIRS = [
    {"prompt": [1, 2, 3], "chosen": [4, 5, 6, 29], "rejected": [7, 29]},
    {"prompt": [8], "chosen": [9, 29], "rejected": [10, 11, 12, 13, 14, 29]},
    {"prompt": [15], "chosen": [16, 17, 29], "rejected": [18, 4, 29]},
]
"""Token ids; 29 ends an answer."""
LABELLED = [
    {"prompt": [1, 2, 3], "completion": [4, 5, 6, 29], "label": True},
    {"prompt": [8], "completion": [10, 11, 12, 13, 14, 29], "label": False},
    {"prompt": [15], "completion": [16, 17, 29], "label": True},
    {"prompt": [20, 21], "completion": [22, 29], "label": False},
    {"prompt": [23, 24], "completion": [25, 3, 29], "label": True},
]
KTO_LOSSES = {
    "kto": {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
    "kto_turned": {"loss_type": "kto", "beta": 0.3},
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "beta": 0.3},
}
"""In kto_turned, policy and reference change places: one of the two estimates of KL is above 0."""

# The datasets library names a data set by a hash of its pickle, which not every pyarrow allows.
NUMBERS = itertools.count()
datasets.arrow_dataset.generate_fingerprint = lambda _: f"data{next(NUMBERS)}"


def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(28)} | {"<pad>": 28, "<eos>": 29}, "w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i != 29)


def trainer(kind: type, arguments: type, model, pairs: list[dict], config: dict, **more):
    records = [
        {"prompt": text(p["prompt"]) + " ", "chosen": text(p["chosen"]), "rejected": text(p["rejected"])}
        for p in pairs
    ]
    made = arguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(pairs),
        **config,
    )
    return kind(
        model,
        args=made,
        train_dataset=Dataset.from_list(records),
        processing_class=tokenizer(),
        **more,
    )


def padded(pairs: list[dict]) -> dict[str, torch.Tensor]:
    """The batch that DPOTrainer's collator makes: all chosen answers, then all rejected ones."""
    rows = [(p["prompt"], p[side]) for side in ("chosen", "rejected") for p in pairs]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    made = {"input_ids": [], "attention_mask": [], "completion_mask": []}
    for prompt, answer in rows:
        spare = longest - len(prompt) - len(answer)
        made["input_ids"].append([*prompt, *answer, *[28] * spare])
        made["attention_mask"].append([1] * (longest - spare) + [0] * spare)
        made["completion_mask"].append([0] * len(prompt) + [1] * len(answer) + [0] * spare)
    return {name: torch.tensor(rows) for name, rows in made.items()}


def kto(found: dict, name: str, model, reference, settings: dict) -> None:
    """What KTOTrainer says of the labelled answers, one batch of all of them."""
    records = [
        {
            "prompt": text(each["prompt"]) + " ",
            "completion": text(each["completion"]),
            "label": each["label"],
        }
        for each in LABELLED
    ]
    made = KTOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=len(LABELLED),
        **settings,
    )
    data = Dataset.from_list(records)
    asked = KTOTrainer(
        model, ref_model=reference, args=made, train_dataset=data, processing_class=tokenizer()
    )
    batch = next(iter(asked.get_train_dataloader()))
    record(found, name, model, asked.compute_loss(model, batch))
    figures = asked._metrics["train" if model.training else "eval"]
    names = ("rewards/chosen", "rewards/rejected", "kl")
    found[f"{name}.figures"] = torch.tensor([figures[each][0] for each in names])


def record(found: dict, name: str, model, loss: torch.Tensor) -> None:
    model.zero_grad()
    loss.backward()
    found[f"{name}.loss"] = loss.detach().reshape(1)
    for weight, parameter in model.named_parameters():
        found[f"{name}.gradient.{weight}"] = parameter.grad.clone()


def main() -> None:
    torch.manual_seed(0)
    model, reference = (LlamaForCausalLM(LlamaConfig(**CONFIG)) for _ in range(2))
    found = {}
    for name, each in (("policy", model), ("reference", reference)):
        found |= {f"{name}.{key}": value.clone() for key, value in each.state_dict().items()}
    for name, settings in (
        ("dpo", {"loss_type": ["sigmoid"], "beta": 0.3}),
        ("ipo", {"loss_type": ["ipo"], "beta": 0.3}),
    ):
        asked = trainer(DPOTrainer, DPOConfig, model, PAIRS, settings, ref_model=reference)
        record(found, name, model, asked.compute_loss(model, padded(PAIRS)))
        figures = asked._metrics["train" if model.training else "eval"]
        found[f"{name}.rewards"] = torch.tensor(
            [figures["rewards/chosen"][0], figures["rewards/rejected"][0]]
        )
    settings = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.5, "cpo_alpha": 0.0}
    asked = trainer(CPOTrainer, CPOConfig, model, PAIRS, settings)
    batch = next(iter(asked.get_train_dataloader()))
    loss, figures = asked.get_batch_loss_metrics(model, batch)
    record(found, "simpo", model, loss)
    found["simpo.rewards"] = torch.tensor([figures["rewards/chosen"], figures["rewards/rejected"]])
    for number, pair in enumerate(PAIRS):
        if len(pair["prompt"]) == 1:
            asked = trainer(ORPOTrainer, ORPOConfig, model, [pair], {"beta": 0.7})
            batch = next(iter(asked.get_train_dataloader()))
            loss, _ = asked.get_batch_loss_metrics(model, batch)
            record(found, f"orpo{number}", model, loss)
    for name, settings in KTO_LOSSES.items():
        models = (reference, model) if name == "kto_turned" else (model, reference)
        kto(found, name, *models, settings)
    header = {"pairs": json.dumps(PAIRS), "labelled": json.dumps(LABELLED), "config": json.dumps(CONFIG)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in found.items()}
    save_file(tensors, Path(__file__).with_name("expected.safetensors"), header)


if __name__ == "__main__":
    main()
