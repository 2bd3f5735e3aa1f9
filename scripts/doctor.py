"""Say what this machine can do, for bug reports: versions, devices, speeds, free memory, extras.

python scripts/doctor.py
python scripts/doctor.py --json

Measuring takes some seconds.
"""

import importlib.util
import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import litlora
from litlora import cli
from litlora.console import say
from litlora.ram import free_ram
from litlora.settings import Doctor

if TYPE_CHECKING:
    import torch

NEEDED = ("torch", "lightning-fabric", "safetensors", "tokenizers", "jsonargparse", "numpy")
EXTRAS = {
    "hub": ("huggingface_hub",),
    "bitsandbytes": ("bitsandbytes",),
    "gguf": ("gguf",),
    "llama-cpp": ("llama-cpp-python",),
    "transformers": ("transformers",),
    "data": ("pyarrow",),
    "datasets": ("datasets",),
    "serve": ("starlette",),
    "schema": ("llguidance",),
    "browser": ("playwright",),
    "eval": ("lm_eval",),
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow-skinny", "mlflow"),
    "trackio": ("trackio",),
    "completion": ("shtab",),
}
"""Of each extra the package that it is about, by any of its names."""
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
SECONDS = 0.5
"""For how long each number format is measured, at least."""


def main(settings: Doctor) -> None:
    import torch

    from litlora.kernels.cpu_build import why_none

    found = {
        "litlora": litlora.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: _version((name,)) for name in NEEDED},
        "cpu": _cpu(),
        "free memory": _gib(free_ram()),
        "compiled code": why_none() or "built",
        "devices": [_device(name, settings) for name in _devices()],
        "extras": {extra: _version(names) for extra, names in EXTRAS.items()},
        "triton": importlib.util.find_spec("triton") is not None,
        "torch threads": torch.get_num_threads(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(("OMP_", "LITLORA_"))},
    }
    if settings.json:
        say(*json.dumps(found, indent=2).split("\n"))
        return
    for name, value in found.items():
        say(*_lines(name, value))


def _lines(name: str, value: object) -> list[str]:
    if isinstance(value, dict):
        shown = ", ".join(f"{key} {each or 'missing'}" for key, each in value.items())
        return [f"{name}: {shown or 'nothing set'}"]
    if isinstance(value, list):
        return [line for each in value for line in _lines(each.pop("device"), each)]
    return [f"{name}: {value}"]


def _version(names: tuple[str, ...]) -> str | None:
    """Of the first of these packages that is installed."""
    for name in names:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _cpu() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    facts = dict(line.split("\t: ", 1) for line in text.splitlines() if "\t: " in line)
    facts = {name.strip(): value for name, value in facts.items()}
    flags = facts.get("flags", "").split()
    return {
        "model": facts.get("model name", platform.processor() or platform.machine()),
        "cores": str(os.cpu_count()),
        "units": " ".join(flag for flag in CPU_FLAGS if flag in flags) or "none of note",
    }


def _devices() -> list[str]:
    import torch

    found = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return ["cpu", *found, *(["mps"] if torch.backends.mps.is_available() else [])]


def _device(name: str, settings: Doctor) -> dict[str, str]:
    """What a device is, and how fast it multiplies in each number format."""
    import torch

    found = {"device": name}
    if name.startswith("cuda"):
        facts = torch.cuda.get_device_properties(name)
        free, total = torch.cuda.mem_get_info(name)
        found["name"] = facts.name
        found["memory"] = f"{_gib(free)} free of {_gib(total)}"
        found["capability"] = f"{facts.major}.{facts.minor}"
    if settings.measure:
        half = () if name == "cpu" else (torch.float16,)  # nothing computes in it on a CPU
        for dtype in (torch.float32, torch.bfloat16, *half):
            found[str(dtype).removeprefix("torch.")] = _speed(torch.device(name), dtype)
    return found


def _speed(device: "torch.device", dtype: "torch.dtype") -> str:
    """Of products of square matrices, as text."""
    import torch

    def synchronize() -> None:
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()

    size = 1024 if device.type == "cpu" else 8192
    try:
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        matrix @ matrix
        synchronize()
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < SECONDS:
            matrix @ matrix
            count += 1
            synchronize()
    except RuntimeError as error:  # a number format that a device does not have
        return f"not supported ({str(error).splitlines()[0][:80]})"
    return f"{2 * size**3 * count / (time.perf_counter() - began) / 1e9:,.1f} GFLOP/s"


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"


if __name__ == "__main__":
    cli.run(main, Doctor)
