"""The files of the attacks. Each function takes a directory with a valid checkpoint at `base` and
an adapter on it at `adapter`, and makes something in it hostile. The document that `attack` names,
beside this file, describes what must happen."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CHAT, MERGE, EXPORT = "chat", "merge", "export"
ATTACKS: dict[str, list[tuple[Any, str, str]]] = {}
"""{document: [(the function that makes the files, the command that reads them, what it must
say)]}."""


def attack(document: str, says: str, *, command: str = CHAT) -> Any:
    def register(make: Any) -> Any:
        ATTACKS.setdefault(document, []).append((make, command, says))
        return make

    return register


class Call:
    """An object that is pickled as a call."""

    def __init__(self, *what: Any) -> None:
        self.what = what

    def __reduce__(self) -> Any:
        return self.what[0], self.what[1:]


def payload(directory: Path) -> Call:
    return Call(os.mkdir, str(directory / "pwned"))


def rewrite(file: Path, change: Any = None, pickled: bytes | None = None, **options: Any) -> None:
    """Rewrite a torch archive: its records are changed by `change(name, data) -> data`, or its
    pickle is replaced."""
    with zipfile.ZipFile(file) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, data in records:
            if pickled is not None and name.endswith("data.pkl"):
                data = pickled
            archive.writestr(name, change(name, data) if change else data)


def content(file: Path) -> Any:
    return torch.load(file, weights_only=True)


WEIGHTS = "base/lit_model.pth"

# ---- pickles


@attack("pickle_payload", "could run code")
def in_the_archive(directory: Path) -> None:
    torch.save({**content(directory / WEIGHTS), "more": payload(directory)}, directory / WEIGHTS)


@attack("pickle_payload", "could run code")
def nested(directory: Path) -> None:
    found = content(directory / WEIGHTS)
    found["litlora"]["x"] = [({"y": [payload(directory)]},)]
    torch.save(found, directory / WEIGHTS)


@attack("pickle_payload", "could run code")
def in_the_old_format(directory: Path) -> None:
    torch.save({"more": payload(directory)}, directory / WEIGHTS, _use_new_zipfile_serialization=False)


@attack("pickle_payload", "could run code")
def bare(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(pickle.dumps(payload(directory)))


@attack("pickle_payload", "could run code")
def by_names_on_the_stack(directory: Path) -> None:
    pickled = b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."
    rewrite(directory / WEIGHTS, pickled=pickled)


@attack("pickle_payload", "could run code|broken")
def in_a_tar(directory: Path) -> None:
    with tarfile.open(directory / WEIGHTS, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(payload(directory), 2)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def hugging_face(directory: Path) -> None:
    """Make `base` a Hugging Face folder with torch shards."""
    base = directory / "base"
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 400,
        "hidden_size": 32,
    }
    config |= {
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "head_dim": 8}
    (base / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in content(base / "lit_model.pth")["model"].items()}
    names = sorted(tensors)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for shard, part in shards.items():
        torch.save({name: tensors[name] for name in part}, base / shard)
    index = {"weight_map": {name: shard for shard, part in shards.items() for name in part}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (base / "lit_model.pth").unlink()
    (base / "model_config.yaml").unlink()


@attack("pickle_payload", "pytorch_model-00002-of-00002.bin: .*could run code")
def in_a_shard(directory: Path) -> None:
    hugging_face(directory)
    torch.save({"x": payload(directory)}, directory / "base/pytorch_model-00002-of-00002.bin")


@attack("pickle_of_size", "could run code")
def bytes_without_end(directory: Path) -> None:
    torch.save({**content(directory / WEIGHTS), "more": Call(bytearray, 10**11)}, directory / WEIGHTS)


@attack("pickle_of_size", "could run code")
def storage_without_end(directory: Path) -> None:
    torch.save(
        {**content(directory / WEIGHTS), "more": Call(torch.UntypedStorage, 10**12)}, directory / WEIGHTS
    )


@attack("pickle_of_size", "nested too deeply")
def a_tower_of_tuples(directory: Path) -> None:
    rewrite(directory / WEIGHTS, pickled=b"\x80\x02})" + b"\x85" * 10**6 + b"K\x01s.")


@attack("pickle_of_size", "neither text nor a number")
def a_name_that_takes_for_ever_to_hash(directory: Path) -> None:
    doubling = b"".join(b"q" + bytes([number]) + b"h" + bytes([number]) + b"\x86" for number in range(30))
    rewrite(directory / WEIGHTS, pickled=b"\x80\x02})" + doubling + b"K\x01s.")


@attack("pickle_of_size", "nested too deeply, or refer to each other without end")
def lists_that_double(directory: Path) -> None:
    found = content(directory / WEIGHTS)
    bomb: list[Any] = ["lol"]
    for _ in range(30):
        bomb = [bomb, bomb]
    found["litlora"]["kind"] = bomb
    torch.save(found, directory / WEIGHTS)


@attack("pickle_of_size", "nested too deeply, or refer to each other without end")
def a_list_that_holds_itself(directory: Path) -> None:
    found = content(directory / WEIGHTS)
    circle: list[Any] = []
    circle.append(circle)
    found["litlora"]["lora"] = circle
    torch.save(found, directory / WEIGHTS)


@attack("pickle_of_size", "more than 5,000,000 steps")
def steps_without_end(directory: Path) -> None:
    rewrite(directory / WEIGHTS, pickled=b"\x80\x02" + b"]" * 5_000_100 + b".")


# ---- archives


@attack("zip_bomb", "compressed or encrypted")
def compressed(directory: Path) -> None:
    rewrite(directory / WEIGHTS, compression=zipfile.ZIP_DEFLATED)


@attack("zip_bomb", "compressed or encrypted")
def a_pickle_that_inflates(directory: Path) -> None:
    with zipfile.ZipFile(directory / WEIGHTS, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"]" * 30_000_000 + b".")


@attack("zip_bomb", "overlaps another")
def records_on_top_of_each_other(directory: Path) -> None:
    file = directory / WEIGHTS
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        first = next(info for info in infos if "/data/" in info.filename)
    data = bytearray(file.read_bytes())
    place = data.rindex(b"PK\5\6")
    start = struct.unpack("<I", data[place + 16 : place + 20])[0]
    seen = 0
    while data[start : start + 4] == b"PK\1\2":
        name, extra, comment = struct.unpack("<HHH", data[start + 28 : start + 34])
        if b"/data/" in data[start + 46 : start + 46 + name]:
            seen += 1
            if seen > 1:  # every record is the first one
                data[start + 42 : start + 46] = struct.pack("<I", first.header_offset)
                data[start + 20 : start + 28] = struct.pack("<II", first.file_size, first.file_size)
        start += 46 + name + extra + comment
    file.write_bytes(data)


@attack("lying_sizes", "tensor data '0' has")
def a_storage_larger_than_its_record(directory: Path) -> None:
    pickled = _one_tensor(count=10**9, size=(10**9,), stride=(1,))
    _archive(directory / WEIGHTS, pickled, {"0": bytes(64)})


@attack("lying_sizes", "tensor data '0' has")
def a_storage_without_a_record(directory: Path) -> None:
    _archive(directory / WEIGHTS, _one_tensor(count=16, size=(16,), stride=(1,)), {})


@attack("lying_sizes", "broken")
def a_view_beyond_its_storage(directory: Path) -> None:
    _archive(directory / WEIGHTS, _one_tensor(count=16, size=(16,), stride=(1,), offset=8), {"0": bytes(64)})


@attack("lying_sizes", "broken")
def a_negative_offset(directory: Path) -> None:
    _archive(directory / WEIGHTS, _one_tensor(count=16, size=(4,), stride=(1,), offset=-8), {"0": bytes(64)})


@attack("lying_sizes", "broken")
def a_negative_size(directory: Path) -> None:
    _archive(directory / WEIGHTS, _one_tensor(count=16, size=(-4,), stride=(1,)), {"0": bytes(64)})


@attack("lying_sizes", "but only 64 bytes of its data")
def one_number_as_a_trillion(directory: Path) -> None:
    _archive(directory / WEIGHTS, _one_tensor(count=16, size=(10**6, 10**6), stride=(0, 0)), {"0": bytes(64)})


@attack("lying_sizes", "cut short")
def an_old_file_that_promises_more(directory: Path) -> None:
    torch.save({"x": torch.zeros(4)}, directory / WEIGHTS, _use_new_zipfile_serialization=False)
    data = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(data.replace(b"K\x04N", b"J\xff\xff\xff\x7fN", 1))


def _one_tensor(*, count: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """The pickle of {"model": {"x": a tensor}, ...} with any sizes."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("storage", torch.FloatStorage, "0", "cpu", count) if isinstance(value, Storage) else None

    rebuild = Call(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, OrderedDict())
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"model": {"x": rebuild}, "litlora": {"format": 1, "kind": "full"}})
    return stream.getvalue()


def _archive(file: Path, pickled: bytes, data: dict[str, bytes]) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name, value in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n"}.items():
            archive.writestr(f"archive/{name}", value)
        for key, value in data.items():
            archive.writestr(f"archive/data/{key}", value)


@attack("strange_tensors", "could run code")
def sparse(directory: Path) -> None:
    _with(directory, torch.sparse_coo_tensor([[0]], [1.0], (10**9,), check_invariants=False))


@attack("strange_tensors", "could run code")
def quantized(directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _with(directory, torch._empty_affine_quantized((4,), scale=1.0, zero_point=0, dtype=torch.quint8))


@attack("strange_tensors", "could run code")
def on_no_device(directory: Path) -> None:
    _with(directory, torch.empty(10**6, 10**6, device="meta"))


@attack("strange_tensors", "could run code|not an ordinary one")
def complex_numbers(directory: Path) -> None:
    _with(directory, torch.zeros(4, dtype=torch.complex64))


@attack("strange_tensors", "is int8|is torch.int8")
def whole_numbers(directory: Path) -> None:
    _with(directory, torch.zeros(4, dtype=torch.int8))


def _with(directory: Path, tensor: Any) -> None:
    found = content(directory / WEIGHTS)
    torch.save({**found, "model": {**found["model"], "model.norm.weight": tensor}}, directory / WEIGHTS)


@attack("strange_roots", "not written by litlora|not a tensor")
def a_list(directory: Path) -> None:
    torch.save([1, 2], directory / WEIGHTS)


@attack("strange_roots", "not written by litlora|not a tensor")
def a_tensor(directory: Path) -> None:
    torch.save(torch.zeros(3), directory / WEIGHTS)


@attack("strange_roots", "is not a tensor")
def names_that_are_numbers(directory: Path) -> None:
    found = content(directory / WEIGHTS)
    torch.save({**found, "model": {**found["model"], 7: torch.zeros(3)}}, directory / WEIGHTS)


# ---- safetensors


def _safetensors(directory: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> None:
    hugging_face(directory)
    base = directory / "base"
    for file in base.glob("pytorch_model*"):
        file.unlink()
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (base / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text) if length is None else length) + text + data
    )


def _entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS: dict[str, tuple[Any, bytes]] = {
    "overlap": ({"a": _entry(0, 16, [4]), "b": _entry(8, 24, [4])}, bytes(24)),
    "a hole": ({"a": _entry(0, 16, [4]), "b": _entry(32, 48, [4])}, bytes(48)),
    "beyond the end": ({"a": _entry(0, 2**40, [2**38])}, bytes(16)),
    "overflow": ({"a": _entry(0, 16, [2**62, 2**62])}, bytes(16)),
    "backwards": ({"a": _entry(16, 0, [4])}, bytes(16)),
    "negative": ({"a": _entry(-16, 0, [4])}, bytes(16)),
    "wrong size of a number": ({"a": _entry(0, 16, [4], "F64")}, bytes(16)),
    "unknown numbers": ({"a": _entry(0, 16, [4], "F4096")}, bytes(16)),
    "trailing data": ({"a": _entry(0, 16, [4])}, bytes(4096)),
    "not an object": ([], b""),
    "deep": (b'{"a":' + b"[" * 100_000, b""),
    "twice the same name": (
        b'{"a":'
        + json.dumps(_entry(0, 16, [4])).encode()
        + b',"a":'
        + json.dumps(_entry(0, 16, [4])).encode()
        + b"}",
        bytes(16),
    ),
}
for _name, (_header, _data) in HEADERS.items():

    @attack("safetensors_header", "model.safetensors: ")
    def _make(directory: Path, header: Any = _header, data: bytes = _data) -> None:
        _safetensors(directory, header, data)

    _make.__name__ = _name.replace(" ", "_")


@attack("safetensors_header", "model.safetensors: broken")
def a_header_of_half_of_all_bytes(directory: Path) -> None:
    _safetensors(directory, {}, length=2**63)


# ---- weights in few bits


def _four_bits(directory: Path, shape: list[int], absmax: torch.Tensor) -> None:
    """Make a Hugging Face folder with one 4-bit weight of bitsandbytes, of this shape and with
    these scales."""
    hugging_face(directory)
    file = directory / "base/pytorch_model-00001-of-00002.bin"
    tensors = content(file)
    name = next(name for name in tensors if "gate_proj" in name)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape}
    tensors |= {name: torch.zeros(1024, 1, dtype=torch.uint8), f"{name}.absmax": absmax}
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.tensor(
        list(json.dumps(state).encode()), dtype=torch.uint8
    )
    torch.save(tensors, file)


@attack("lying_sizes", "says that the weight is 1048576 x 1048576, but it has 1,024 bytes")
def four_bits_of_a_trillion(directory: Path) -> None:
    _four_bits(directory, [2**20, 2**20], torch.ones(32))


@attack("lying_sizes", "absmax has 1 values in float32; it needs 32 in floating point")
def four_bits_with_one_scale(directory: Path) -> None:
    _four_bits(directory, [64, 32], torch.ones(1))


@attack("strange_tensors", "gate_proj.weight holds values that are not finite", command=MERGE)
def four_bits_with_scales_that_are_none(directory: Path) -> None:
    _four_bits(directory, [64, 32], torch.full((32,), float("nan")))


# ---- paths


def _index(directory: Path, shard: Any) -> None:
    hugging_face(directory)
    file = directory / "base/pytorch_model.bin.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = shard
    file.write_text(json.dumps(index))


for _number, _shard in enumerate(
    ("../../outside.bin", "/etc/passwd", "..", "", "a\0b", "\x1b[2Jx/y", 5, ["x"])
):

    @attack("paths_in_an_index", "is not the name of a file in this folder")
    def _make(directory: Path, shard: Any = _shard) -> None:
        _index(directory, shard)

    _make.__name__ = f"shard_{_number}"


@attack("paths_in_an_index", "missing, though")
def shards_without_number(directory: Path) -> None:
    hugging_face(directory)
    for file in (directory / "base").glob("pytorch_model*"):
        file.unlink()
    torch.save({}, directory / "base/pytorch_model-1-of-99999999999.bin")


@attack("links", "is a link to .*outside its own directory")
def a_sidecar_that_is_a_secret(directory: Path) -> None:
    (directory / "secret.txt").write_text("a private key")
    (directory / "base/vocab.json").symlink_to(directory / "secret.txt")


@attack("links", "is a link to .*outside its own directory", command=MERGE)
def a_style_that_is_a_secret(directory: Path) -> None:
    (directory / "secret.yaml").write_text("style: plain")
    (directory / "adapter/prompt_style.yaml").unlink(missing_ok=True)
    (directory / "adapter/prompt_style.yaml").symlink_to(directory / "secret.yaml")


@attack("links", "is a link to .*outside its own directory", command=MERGE)
def a_login_of_the_same_name(directory: Path) -> None:
    (directory / ".docker").mkdir()
    (directory / ".docker/config.json").write_text('{"auths": {"registry": {"auth": "c2VjcmV0"}}}')
    (directory / "adapter/config.json").symlink_to(directory / ".docker/config.json")


@attack("links", "is a link to .*outside its own directory", command=MERGE)
def a_name_like_those_of_the_cache(directory: Path) -> None:
    (directory / "private/blobs").mkdir(parents=True)
    (directory / "private/blobs" / ("a" * 40)).write_text("{}")
    (directory / "base/generation_config.json").symlink_to(directory / "private/blobs" / ("a" * 40))


@attack("links", "cannot be read as JSON", command=MERGE)
def a_blob_that_is_not_what_its_name_says(directory: Path) -> None:
    (directory / "models--x/snapshots").mkdir(parents=True)
    (directory / "models--x/blobs").mkdir()
    blob = directory / "models--x/blobs" / ("a" * 40)
    blob.write_text("a private key")
    (directory / "base/config.json").symlink_to(blob)


@attack("links", "is a link that leads nowhere")
def a_link_to_itself(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(directory / WEIGHTS)


@attack("chains", "runs in a circle", command=MERGE)
def its_own_base(directory: Path) -> None:
    _base_of(directory, ".")


@attack("chains", "runs in a circle", command=MERGE)
def its_own_base_by_a_link(directory: Path) -> None:
    (directory / "elsewhere").symlink_to(directory / "adapter")
    _base_of(directory, "../elsewhere")


@attack("chains", "not the base that", command=MERGE)
def outside_by_a_link(directory: Path) -> None:
    shutil.copytree(directory / "base", directory / "private")
    found = content(directory / "private/lit_model.pth")
    found["model"]["model.norm.weight"] += 1
    torch.save(found, directory / "private/lit_model.pth")
    (directory / "adapter/base").symlink_to(directory / "private")
    _base_of(directory, "base")


@attack("chains", "the last is not a checkpoint directory", command=MERGE)
def no_checkpoint_at_all(directory: Path) -> None:
    _base_of(directory, "../../../../../../../../etc")


@attack("chains", "the last is not a checkpoint directory", command=MERGE)
def a_path_that_steers_the_terminal(directory: Path) -> None:
    _base_of(directory, "\x1b]0;owned\x07\u202egnorw")


def _base_of(directory: Path, path: str) -> None:
    file = directory / "adapter/lit_model.pth"
    found = content(file)
    found["litlora"]["base"].update(path=path, absolute_path=str(directory / "adapter" / path))
    torch.save(found, file)


# ---- text files


YAMLS = {
    "a tag of Python's": "!!python/object/apply:os.mkdir [pwned]",
    "a name of Python's": "vocab_size: !!python/name:os.system",
    "doubling aliases": "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "merges without end": "a: &a {k: 1}\n" + "".join(
        f"{new}: &{new} {{<<: [{','.join([f'*{old}'] * 50)}]}}\n"
        for old, new in zip("abcde", "bcdef", strict=True)
    ),
    "depth": "[" * 5000,
    "a number of a million digits": "vocab_size: " + "9" * 100_000,
    "a hexadecimal number without end": "vocab_size: 0x" + "f" * 100_000,
    "a date that is none": "vocab_size: 2001-99-99",
    "binary that is none": "vocab_size: !!binary é",
    "half a megabyte": "#" * 500_000,
    "a control code": "vocab_size: \x1b[2J",
    "bytes that are no text": "\udcff",
    "nothing": "",
}  # fmt: skip
for _name, _text in YAMLS.items():
    for _file in ("model_config.yaml", "prompt_style.yaml"):

        @attack("yaml", f"{_file}: ")
        def _make(directory: Path, text: str = _text, file: str = _file) -> None:
            (directory / "base" / file).write_bytes(text.encode(errors="surrogateescape"))

        _make.__name__ = f"{_name}_in_{_file}".replace(" ", "_")


JSONS = {
    "depth": "[" * 100_000,
    "a depth that json can read": '{"a":' * 200 + "1" + "}" * 200,
    "a number of many digits": '{"vocab_size": ' + "9" * 100_000 + "}",
    "half a character": '{"eos_token": "\\ud800", "weight_map": {}, "eos_token_id": "\\ud800"}',
    "a list": "[]",
    "cut short": '{"a": ',
    "too large": '{"a": "' + "x" * 2**24 + '"}',
}
for _name, _text in JSONS.items():
    for _file in (
        "tokenizer_config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "config.json",
        "pytorch_model.bin.index.json",
    ):

        @attack("json", f"{_file}: ")
        def _make(directory: Path, text: str = _text, file: str = _file) -> None:
            if file in ("config.json", "pytorch_model.bin.index.json"):
                hugging_face(directory)
            (directory / "base" / file).write_text(text)

        _make.__name__ = f"{_name}_in_{_file}".replace(" ", "_")


@attack("huge_models", "no model is that large")
def a_width_of_a_trillion(directory: Path) -> None:
    _config(directory, hidden_size=10**12)


@attack("huge_models", "holds 21 weights; its configuration describes")
def layers_without_end(directory: Path) -> None:
    _config(directory, num_hidden_layers=2**27)


@attack("huge_models", "holds 21 weights; its configuration describes")
def experts_without_end(directory: Path) -> None:
    _config(directory, num_experts=2**27, num_experts_per_tok=1, moe_intermediate_size=8)


@attack("huge_models", "holds 21 weights; its configuration describes")
def norms_without_end(directory: Path) -> None:
    _config(directory, qk_norm="each_head", num_attention_heads=2**27, num_key_value_heads=2**27)


@attack("huge_models", "has shape .*; the architecture needs")
def a_vocabulary_without_end(directory: Path) -> None:
    _config(directory, vocab_size=2**28)


def _config(directory: Path, **changes: Any) -> None:
    file = directory / "base/model_config.yaml"
    file.write_text(file.read_text() + "".join(f"{name}: {value}\n" for name, value in changes.items()))


@attack("remote_code", "is not covered")
def a_model_that_brings_its_code(directory: Path) -> None:
    hugging_face(directory)
    file = directory / "base/config.json"
    code = {
        "model_type": "evil",
        "architectures": ["EvilForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"},
    }
    file.write_text(json.dumps(json.loads(file.read_text()) | code))
    (directory / "base/modeling_evil.py").write_text("import os; os.mkdir('pwned')")


def _stored_pattern(directory: Path, pattern: str) -> None:
    file = directory / "adapter/lit_model.pth"
    found = content(file)
    found["litlora"]["lora"]["rank_pattern"] = {pattern: 3}
    torch.save(found, file)


def peft_folder(directory: Path, patterns: dict[str, int]) -> None:
    """Make the adapter a PEFT folder with these alphas."""
    shutil.rmtree(directory / "adapter")
    (directory / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "alpha_pattern": patterns}
    config["base_model_name_or_path"] = str(directory / "base")
    (directory / "adapter/adapter_config.json").write_text(json.dumps(config))
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{layer}.lora_A.weight": torch.zeros(2, 32), f"{layer}.lora_B.weight": torch.zeros(32, 2)}
    save_file(pair, directory / "adapter/adapter_model.safetensors")


def a_pattern_that_never_ends(directory: Path) -> None:
    _stored_pattern(directory, "(\\w+\\.?)+X")


def alternatives_that_never_end(directory: Path) -> None:
    _stored_pattern(directory, "(|)" * 40 + "X")


def optional_parts_that_never_end(directory: Path) -> None:
    _stored_pattern(directory, ".?" * 40 + "X")


def a_pattern_of_peft_that_never_ends(directory: Path) -> None:
    peft_folder(directory, {"(a|a|\\w)+X": 3, "(.*)" * 40 + "X": 5})


def thirty_thousand_patterns(directory: Path) -> None:
    peft_folder(directory, {f"model.layers.{n}.self_attn.k_proj": 3 for n in range(30_000)})


PATTERNS = [
    a_pattern_that_never_ends,
    alternatives_that_never_end,
    optional_parts_that_never_end,
    a_pattern_of_peft_that_never_ends,
    thirty_thousand_patterns,
]
"""Each makes an adapter whose patterns match no layer, but take for ever with a search by trial."""


@attack("patterns", "has a group of the kind", command=MERGE)
def a_pattern_that_looks_around(directory: Path) -> None:
    _stored_pattern(directory, "(?=(\\w+)+X)q_proj")


@attack("patterns", "repeats what may be empty", command=MERGE)
def an_empty_repetition_of_peft(directory: Path) -> None:
    peft_folder(directory, {"(\\w*)*X": 3})


@attack("patterns", "too many states|repeats", command=MERGE)
def repetitions_of_repetitions(directory: Path) -> None:
    _stored_pattern(directory, "((a{999}){999}){999}")


@attack("patterns", "too many to match", command=MERGE)
def more_patterns_than_memory_holds(directory: Path) -> None:
    peft_folder(directory, {f"{n:05}" + "x{900}": 3 for n in range(3000)})


# ---- pipes and devices


def _pipe(file: Path) -> None:
    file.unlink(missing_ok=True)
    os.mkfifo(file)


@attack("pipes", "model_config.yaml: .*it is a pipe")
def an_architecture_that_is_a_pipe(directory: Path) -> None:
    _pipe(directory / "base/model_config.yaml")


@attack("pipes", "model_config.yaml: .*it is a pipe, a device")
def an_architecture_without_end(directory: Path) -> None:
    (directory / "base/model_config.yaml").unlink()
    (directory / "base/model_config.yaml").symlink_to("/dev/zero")


@attack("pipes", "lit_model.pth: it is a pipe")
def weights_that_are_a_pipe(directory: Path) -> None:
    _pipe(directory / WEIGHTS)


@attack("pipes", "tokenizer.json: .*it is a pipe")
def a_tokenizer_that_is_a_pipe(directory: Path) -> None:
    _pipe(directory / "base/tokenizer.json")


@attack("pipes", "generation_config.json: .*it is a pipe")
def a_file_beside_the_weights_that_is_a_pipe(directory: Path) -> None:
    _pipe(directory / "base/generation_config.json")


@attack("pipes", "special_tokens_map.json: is a link that leads nowhere")
def a_file_beside_the_weights_that_is_a_link_to_nothing(directory: Path) -> None:
    (directory / "base/special_tokens_map.json").symlink_to("nothing")


@attack("pipes", "prompt_style.yaml: is a link that leads nowhere")
def a_prompt_style_that_leads_nowhere(directory: Path) -> None:
    style = directory / "base/prompt_style.yaml"
    style.unlink(missing_ok=True)
    style.symlink_to("nowhere")


# ---- chat templates


TEMPLATES = {
    "loops in loops": (
        "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3,
        "was stopped",
    ),
    "a power": ("{{ 10 ** (10 ** 9) }}", "was stopped"),
    "text times a billion": ("{{ 'a' * 10 ** 10 }}", "was stopped"),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "was stopped",
    ),
    "padding": ("{{ 'x' | center(10 ** 10) }}", "was stopped"),
    "formatting": ("{{ '{:>9999999999}'.format(1) }}", "was stopped"),
    "a long answer": ("{{ 'a' * 10 ** 8 }}", "was stopped"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "depth": ("{{" + "(" * 5000 + "1" + ")" * 5000 + "}}", "RecursionError"),
    "the way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "forbidden"),
    "the way out by a function": ("{{ cycler.__init__.__globals__.os.mkdir('pwned') }}", "forbidden"),
    "the way out by a namespace": ("{% set n = namespace() %}{% set n.__init__ = 1 %}", "forbidden"),
    "a file": ("{% include '/etc/passwd' %}", "no loader"),
    "a control code": ("{{ raise_exception('\x1b]0;owned\x07') }}", "refuses the conversation"),
    "half a character": ("{{ '\\ud800' }}", "UnicodeEncodeError"),
}
for _name, (_text, _says) in TEMPLATES.items():

    @attack("chat_template", f"chat_template.jinja: the chat template .*{_says}")
    def _make(directory: Path, text: str = _text) -> None:
        (directory / "base/chat_template.jinja").write_text(text)

    _make.__name__ = _name.replace(" ", "_")


# ---- tokenizers


@attack("tokenizer", "tokenizer.json: cannot encode this text")
def a_regular_expression_that_never_ends(directory: Path) -> None:
    _tokenizer(
        directory,
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": "(a|aa)+$"},
            "behavior": "Isolated",
            "invert": False,
        },
    )


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


@attack("tokenizer", "tokenizer.json: not a usable tokenizer file: it takes too much time or memory")
def a_normalizer_that_doubles_33_times(directory: Path) -> None:
    _tokenizer(directory, normalizer={"type": "Sequence", "normalizers": [DOUBLE] * 33})


@attack("tokenizer", "tokenizer.json: cannot decode: it takes too much time or memory")
def a_decoder_that_doubles_40_times(directory: Path) -> None:
    double = {"type": "Replace", "pattern": {"Regex": "[\\s\\S]"}, "content": "aa"}
    decoder = json.loads((directory / "base/tokenizer.json").read_text())["decoder"]
    steps = [decoder, {"type": "Fuse"}, *[double] * 40]
    _tokenizer(directory, decoder={"type": "Sequence", "decoders": steps})


@attack("tokenizer", "tokenizer.json: has 300,000,000 bytes")
def a_file_without_end(directory: Path) -> None:
    os.truncate(directory / "base/tokenizer.json", 300_000_000)


@attack("tokenizer", "tokenizer.json: not a usable tokenizer file")
def a_deep_tokenizer(directory: Path) -> None:
    (directory / "base/tokenizer.json").write_text('{"model":' + "[" * 100_000)


@attack("tokenizer", "lacks the token")
def an_end_that_is_not_there(directory: Path) -> None:
    (directory / "base/tokenizer_config.json").write_text('{"eos_token": "\\u001b[2J\\u202e"}')


@attack("tokenizer", "is not the number of a token")
def stops_that_are_no_numbers(directory: Path) -> None:
    (directory / "base/generation_config.json").write_text('{"eos_token_id": [[1], "x"]}')


@attack("tokenizer", "broken, or not a SentencePiece model")
def a_piece_of_a_megabyte(directory: Path) -> None:
    _sentencepiece(directory, b"\x0a\x80\x80\x80\x01" + b"\x0a\xfa\xff\x3f" + b"a" * 2**20)


@attack("tokenizer", "broken, or not a SentencePiece model")
def a_number_of_a_megabyte(directory: Path) -> None:
    _sentencepiece(directory, b"\xff" * 2**20)


def _sentencepiece(directory: Path, data: bytes) -> None:
    (directory / "base/tokenizer.json").unlink()
    (directory / "base/tokenizer.model").write_bytes(data)


def _tokenizer(directory: Path, **changes: Any) -> None:
    file = directory / "base/tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ---- training states


def a_moment_of_three_values(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg_sq"] = torch.ones(3)


def a_step_that_is_a_vector(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["step"] = torch.ones(4)


def betas_that_are_text(state: dict[str, Any]) -> None:
    state["optimizer"]["param_groups"][0]["betas"] = "0.9, 0.95"


def a_generator_beyond_its_end(state: dict[str, Any]) -> None:
    state["ranks"][0]["generators"]["numpy"][2] = 10**7


def time_that_is_not_a_number(state: dict[str, Any]) -> None:
    state["position"]["seconds"] = float("nan")


STATES = [
    a_moment_of_three_values,
    a_step_that_is_a_vector,
    betas_that_are_text,
    a_generator_beyond_its_end,
    time_that_is_not_a_number,
]
"""Each makes a training state, as state.pth holds it, hostile."""
