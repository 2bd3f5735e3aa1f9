"""The memory that each device holds of a model that trains, by model and number of devices: computed
from the shapes of the weights, as a table for docs/many-gpus.md.

    python benchmarks/device_memory.py

Weights, gradients and AdamW's two moments. Activations come on top, as do the blocks that FSDP
fetches: two at a time, and what is outside of the blocks.
"""

from dataclasses import dataclass

from litlora.config import ModelConfig
from litlora.lora import LoRAConfig, add_lora
from litlora.model import GPT

LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
}
LLAMA_1B |= {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
LLAMA_8B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA_70B |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
SHAPES = {"Llama 3.2 1B": LLAMA_1B, "Llama 3.1 8B": LLAMA_8B, "Llama 3.1 70B": LLAMA_70B}
"""As their config.json says."""
RANK = 16
DEVICES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Held:
    """What a device holds, in bytes."""

    weights: int
    gradients: int
    moments: int
    fetched: int = 0
    """At most, of what belongs to other devices."""

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments + self.fetched


def held(config: ModelConfig, method: str, devices: int, *, itemsize: int, rank: int = RANK) -> Held:
    """Of rank 0, which has the largest share. A weight of the base takes `itemsize` bytes; one of the
    adapter 4."""
    model = GPT.without_weights(config)
    base = {id(parameter): parameter for parameter in model.parameters()}
    if method == "lora":
        add_lora(model, LoRAConfig(rank=rank))
    adapter = sum(p.numel() for p in model.parameters() if id(p) not in base)
    # A weight is divided by its rows; the first device has one more where they do not divide.
    share = sum(-(-p.size(0) // devices) * p[0].numel() for p in base.values())
    fetched = 0
    if devices > 1:
        blocks = [sum(p.numel() for p in b.parameters() if id(p) in base) for b in model.model.layers]
        fetched = 2 * max(blocks) + sum(p.numel() for p in base.values()) - sum(blocks)
    trained, size = (adapter, 4) if method == "lora" else (share, itemsize)
    return Held(share * itemsize + adapter * 4, trained * size, 2 * trained * size, fetched * itemsize)


def table() -> str:
    """In GiB, by fsdp; on one device nothing is divided."""
    lines = ["| model, method | " + " | ".join(f"{count}" for count in DEVICES) + " |"]
    lines.append("| --- |" + " ---: |" * len(DEVICES))
    for name, shape in SHAPES.items():
        config = ModelConfig(**shape, max_position_embeddings=131072)
        for method, what, itemsize in (
            ("lora", f"LoRA of rank {RANK}, base in bf16", 2),
            ("full", "full, fp32", 4),
        ):
            sizes = [held(config, method, count, itemsize=itemsize).total / 2**30 for count in DEVICES]
            lines.append(f"| {name}, {what} | " + " | ".join(f"{size:,.1f}" for size in sizes) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
