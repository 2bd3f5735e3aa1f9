"""The layout: a checkpoint is written and read completely or not at all, and on its own base
only."""

import os
import pickle
import shutil

import pytest
import torch
import yaml
from conftest import tiny_config

from litlora.adapters.merge import merge_chain
from litlora.checkpoint import Beside, open_checkpoint, reference_to, resolve, write_full
from litlora.checkpoint import write_adapter as store_adapter
from litlora.errors import BaseMismatchError, CheckpointError, UserError
from litlora.load import load
from litlora.lora import Adapter, LoRAConfig, adapter_of, add_lora
from litlora.lora.adapter import parse_tensors
from litlora.model import GPT
from litlora.paths import CHECKPOINT_NAMES, output_dir
from litlora.prompts import STYLES
from litlora.storage.fingerprint import fingerprint


def write_adapter(directory, base_dir, *, seed=1, targets="all-linear", alpha=16, rank=2, **more):
    """An adapter with random A and B, as a run would leave it."""
    torch.manual_seed(seed)
    config = LoRAConfig(rank=rank, alpha=alpha, targets=targets, **more)
    loaded = load(base_dir)
    add_lora(loaded.model, config)
    adapter = adapter_of(loaded.model, config)
    random = {name: torch.randn_like(t) * 0.1 for name, t in adapter.tensors.items()}
    base = reference_to(loaded.chain.top, directory)
    store_adapter(
        directory,
        Adapter(config, *parse_tensors(random, config), base),
        loaded.model.config,
        sidecars_from=[base_dir],
        beside=Beside(prompt_style=STYLES["alpaca"]),
    )
    return directory


def logits(directory, **options):
    with torch.no_grad():
        return load(directory, **options).model(torch.arange(20).view(1, 20))


def test_full_round_trip(make_checkpoint):
    directory = make_checkpoint("base", dtype=torch.bfloat16)
    again = open_checkpoint(directory)
    torch.manual_seed(0)
    expected = dict(GPT(tiny_config()).bfloat16().named_parameters())
    assert again.tensors.keys() == expected.keys()
    assert all(
        torch.equal(t, expected[name]) and t.dtype == torch.bfloat16 for name, t in again.tensors.items()
    )
    assert (directory / "tokenizer.json").is_file() and (directory / "tokenizer_config.json").is_file()


def test_the_file_is_plain_torch(base):
    content = torch.load(base / "lit_model.pth", weights_only=True, mmap=True)
    assert content["litlora"] == {"format": 1, "kind": "full"}
    assert all(isinstance(t, torch.Tensor) for t in content["model"].values())


def test_an_adapter_describes_itself_and_holds_nothing_else(tmp_path, base):
    directory = write_adapter(tmp_path / "adapter", base)
    content = torch.load(directory / "lit_model.pth", weights_only=True)
    assert content["litlora"]["kind"] == "adapter"
    described = {"rank": 2, "alpha": 16.0, "dropout": 0.0, "targets": "all-linear", "rslora": False}
    described |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": []}
    assert content["litlora"]["lora"] == described
    assert content["litlora"]["base"]["path"] == "../base"
    assert content["litlora"]["base"]["fingerprint"] == open_checkpoint(base).fingerprint
    assert {name.rpartition(".")[2] for name in content["model"]} == {"lora_A", "lora_B"}
    assert yaml.safe_load((directory / "prompt_style.yaml").read_text()) == {"style": "alpaca"}


def test_a_view_is_stored_at_its_own_size(tmp_path, base, tokenizer_dir):
    tensors = {
        name: torch.cat([t, torch.zeros(10_000, *t.shape[1:])])[: len(t)]
        for name, t in open_checkpoint(base).tensors.items()
    }
    write_full(tmp_path / "views", tensors, tiny_config(), sidecars_from=[tokenizer_dir])
    assert (tmp_path / "views/lit_model.pth").stat().st_size < 1.1 * (base / "lit_model.pth").stat().st_size


# ---- merged and live


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_equals_live(tmp_path, make_checkpoint, dtype):
    adapter = write_adapter(tmp_path / "adapter", make_checkpoint("base", dtype=dtype), alpha=5.0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    merged, live = logits(adapter), logits(adapter, live=True)
    torch.testing.assert_close(merged, live, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(merged, logits(tmp_path / "base"), atol=tolerance, rtol=tolerance)


def test_a_chain_equals_merging_one_by_one(tmp_path, base):
    first = write_adapter(tmp_path / "first", base, seed=1)
    second = write_adapter(tmp_path / "second", first, seed=2, targets="qv", rank=4)
    chain = resolve(second)
    assert [link.directory.name for link in (chain.base, *chain.adapters)] == ["base", "first", "second"]
    tensors, config = merge_chain(resolve(first))
    write_full(tmp_path / "merged", tensors, config, sidecars_from=[first])
    one_by_one, _ = merge_chain(resolve(second, base_dir=tmp_path / "merged", allow_base_mismatch=True))
    # The stand-in replaces the base of the last link, which here is the first adapter's.
    expected = {**merge_chain(chain)[0]}
    W = expected["model.layers.0.self_attn.q_proj.weight"]
    a, b = open_checkpoint(first).tensors, open_checkpoint(second).tensors
    name = "model.layers.0.self_attn.q_proj"
    by_hand = open_checkpoint(base).tensors[f"{name}.weight"] + 8 * a[f"{name}.lora_B"] @ a[f"{name}.lora_A"]
    torch.testing.assert_close(W, by_hand + 4 * b[f"{name}.lora_B"] @ b[f"{name}.lora_A"])
    assert one_by_one.keys() == expected.keys()


def test_an_adapter_of_a_tied_head_unties_it(tmp_path, make_checkpoint):
    adapter = write_adapter(
        tmp_path / "adapter", make_checkpoint("base", tie_word_embeddings=True), targets=["lm_head", "q_proj"]
    )
    torch.testing.assert_close(logits(adapter), logits(adapter, live=True), atol=1e-5, rtol=1e-4)
    tensors, config = merge_chain(resolve(adapter))
    assert not config.tie_word_embeddings
    assert torch.equal(
        tensors["model.embed_tokens.weight"],
        open_checkpoint(tmp_path / "base").tensors["model.embed_tokens.weight"],
    )


def test_a_merge_answers_for_its_chain_until_it_is_changed(tmp_path, base):
    first = write_adapter(tmp_path / "first", base)
    second = write_adapter(tmp_path / "second", first, seed=2)
    chain = resolve(first)
    tensors, config = merge_chain(chain)
    write_full(tmp_path / "merged", tensors, config, sidecars_from=[first], merged_from=chain.top.fingerprint)
    on_merged = resolve(second, base_dir=tmp_path / "merged")
    assert [link.directory.name for link in (on_merged.base, *on_merged.adapters)] == ["merged", "second"]
    torch.testing.assert_close(merge_chain(on_merged)[0], merge_chain(resolve(second))[0])
    file = tmp_path / "merged/lit_model.pth"
    content = torch.load(file, weights_only=True)
    content["model"] = {name: t + 0.01 for name, t in content["model"].items()}
    torch.save(content, file)
    with pytest.raises(BaseMismatchError):
        resolve(second, base_dir=tmp_path / "merged")


# ---- the right base


def test_the_fingerprint_sees_every_tensor_name_shape_and_dtype(base):
    tensors = open_checkpoint(base).tensors
    original = fingerprint(tensors)
    assert fingerprint(dict(reversed(tensors.items()))) == original, "the order in the file is no matter"
    for name, tensor in tensors.items():
        assert fingerprint({**tensors, name: tensor + 1}) != original
    name, tensor = next(iter(tensors.items()))
    assert fingerprint({**tensors, name: tensor.reshape(-1)}) != original
    assert fingerprint({**tensors, name: tensor.view(torch.int32)}) != original
    assert fingerprint({("x" if n == name else n): t for n, t in tensors.items()}) != original


def test_another_base_of_equal_shapes_is_refused(tmp_path, base, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", base)
    other = make_checkpoint("other", seed=7)
    with pytest.raises(
        BaseMismatchError, match=r"other: not the base that .*adapter was trained on.*allow_base_mismatch"
    ):
        resolve(adapter, base_dir=other)
    assert resolve(adapter, base_dir=other, allow_base_mismatch=True).base.directory == other


def test_a_base_fine_tuned_in_place_is_refused(tmp_path, base, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", base)
    make_checkpoint("base", seed=3)
    with pytest.raises(BaseMismatchError):
        resolve(adapter)


def test_a_base_whose_config_was_changed_is_refused(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    (base / "model_config.yaml").write_text(yaml.safe_dump(tiny_config(rope_theta=123.0).to_dict()))
    with pytest.raises(BaseMismatchError, match="rope_theta is 123.0"):
        resolve(adapter)


def test_moving_the_tree_or_the_adapter_keeps_working(tmp_path, base):
    tree = tmp_path / "tree"
    tree.mkdir()
    shutil.move(base, tree / "base")
    adapter = write_adapter(tree / "adapter", tree / "base")
    expected = logits(adapter)
    shutil.move(adapter, tmp_path / "elsewhere")
    assert torch.equal(logits(tmp_path / "elsewhere"), expected), "the adapter alone was moved"
    shutil.move(tmp_path / "elsewhere", tree / "adapter")
    shutil.move(tree, tmp_path / "moved")
    assert torch.equal(logits(tmp_path / "moved/adapter"), expected), "the whole tree was moved"
    shutil.move(tmp_path / "moved/base", tmp_path / "renamed")
    with pytest.raises(
        CheckpointError,
        match=r"adapter -> .*base: the last is not a checkpoint directory.*base_checkpoint_dir",
    ):
        load(tmp_path / "moved/adapter")
    assert torch.equal(logits(tmp_path / "moved/adapter", base_dir=tmp_path / "renamed"), expected)


def test_a_stand_in_finds_its_link_in_a_chain(tmp_path, base):
    first = write_adapter(tmp_path / "first", base)
    second = write_adapter(tmp_path / "second", first, seed=2)
    expected = logits(second)
    shutil.move(base, tmp_path / "renamed")
    assert torch.equal(logits(second, base_dir=tmp_path / "renamed"), expected)
    shutil.move(tmp_path / "renamed", base)
    shutil.move(first, tmp_path / "first_renamed")
    assert torch.equal(logits(second, base_dir=tmp_path / "first_renamed"), expected)


def test_a_stand_in_for_a_full_model_is_refused(base, make_checkpoint):
    with pytest.raises(CheckpointError, match="is not an adapter"):
        resolve(base, base_dir=make_checkpoint("other"))


def test_a_chain_in_a_circle_is_shown(tmp_path, base):
    first = write_adapter(tmp_path / "first", base)
    second = write_adapter(tmp_path / "second", first)
    content = torch.load(first / "lit_model.pth", weights_only=True)
    content["litlora"]["base"].update(path="../second", absolute_path=str(second))
    torch.save(content, first / "lit_model.pth")
    for start in (first, second):
        with pytest.raises(CheckpointError, match="circle"):
            resolve(start, allow_base_mismatch=True)


def test_an_adapter_that_does_not_fit_its_base_is_refused(tmp_path, base, make_checkpoint):
    adapter = write_adapter(tmp_path / "adapter", base)
    wider = make_checkpoint("wider", intermediate_size=96)
    with pytest.raises(
        CheckpointError, match=r"updates model\.layers\.0\.mlp\.gate_proj as 64 x 32; the base has \(96, 32\)"
    ):
        load(adapter, base_dir=wider, allow_base_mismatch=True)
    shallow = make_checkpoint("shallow", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="which the base does not have"):
        load(adapter, base_dir=shallow, allow_base_mismatch=True)


# ---- broken and hostile files


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def break_file(file, how, tmp_path):
    content = file.read_bytes()
    if how == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "text":
        file.write_text("not a checkpoint")
    elif how == "code in a zip":
        torch.save({"model": {}, "litlora": Payload(str(tmp_path / "pwned"))}, file)
    elif how == "a bare pickle":
        file.write_bytes(pickle.dumps(Payload(str(tmp_path / "pwned"))))
    else:
        torch.save(how, file)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("truncated", "broken"),
        ("empty", "broken"),
        ("text", "refused|broken"),
        ("code in a zip", "could run code"),
        ("a bare pickle", "could run code"),
        ({"a": torch.zeros(2)}, "not written by litlora"),
        ([1, 2], "not written by litlora"),
        ({"model": {}, "litlora": {"format": 99, "kind": "full"}}, "format 99"),
        ({"model": {}, "litlora": {"format": 1, "kind": "half"}}, "kind is 'half'"),
        ({"model": {"x": 1}, "litlora": {"format": 1, "kind": "full"}}, "'x' of \"model\" is not a tensor"),
        ({"model": {}, "litlora": {"format": 1, "kind": "adapter"}}, "lora.rank is None"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_file_is_refused_in_one_line_with_its_name(tmp_path, base, how, says):
    break_file(base / "lit_model.pth", how, tmp_path)
    with pytest.raises(CheckpointError, match=rf"base/lit_model\.pth: .*({says})"):
        open_checkpoint(base)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["litlora"]["lora"].update(rank=0), "rank 0: must be at least 1"),
        (lambda c: c["litlora"]["lora"].update(rank="2"), "lora.rank is '2'"),
        (lambda c: c["litlora"]["lora"].update(alpha=float("nan")), "alpha nan: must be"),
        (lambda c: c["litlora"]["lora"].update(rank=3), "(make no|do not form an) update of rank 3"),
        (lambda c: c["litlora"]["base"].pop("fingerprint"), "base.fingerprint is None"),
        (lambda c: c["model"].pop(next(iter(c["model"]))), "has no lora_A, but lora_B"),
        (
            lambda c: c["model"].update({"model.norm.weight": torch.zeros(2)}),
            "has lora_A or lora_B|is not part of an adapter",
        ),
        (lambda c: c["model"].clear(), "adapter is empty"),
    ],
)
def test_an_adapter_with_a_broken_description_is_refused(tmp_path, base, change, says):
    file = write_adapter(tmp_path / "adapter", base) / "lit_model.pth"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=rf"adapter/lit_model\.pth: .*({says})"):
        open_checkpoint(file)


def test_a_missing_or_broken_tokenizer_is_named(base):
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json: not a usable tokenizer file"):
        load(base)
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer.json: no such file"):
        load(base)


# ---- writing


def test_a_failed_write_leaves_what_was_there(tmp_path, base, tokenizer_dir, monkeypatch):
    before = (base / "lit_model.pth").read_bytes()

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("litlora.storage.torch_file.TorchFile.finish", full_disk)
    with pytest.raises(OSError, match="No space") as raised:
        write_full(base, {}, tiny_config(), sidecars_from=[tokenizer_dir])
    assert raised.value.filename in (str(base), str(base.resolve())), "what could not be written is named"
    assert (base / "lit_model.pth").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "nothing half written may remain"


def test_output_dir_refuses_what_would_lose_something(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/lit_model.pth").write_text("x")

    def check(path, *, overwrite=False, inputs=()):
        return output_dir(str(path), overwrite=overwrite, names=CHECKPOINT_NAMES, inputs=list(inputs))

    assert check(tmp_path / "new/deeper") == tmp_path / "new/deeper"
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="already holds lit_model.pth.*overwrite"):
        check(tmp_path / "full")
    assert check(tmp_path / "full", overwrite=True) == tmp_path / "full"
    with pytest.raises(UserError, match="which is read"):
        check(tmp_path, overwrite=True, inputs=[tmp_path / "full"])
    (tmp_path / "full/thesis.tex").write_text("x")
    with pytest.raises(UserError, match="thesis.tex, which litlora did not write"):
        check(tmp_path / "full", overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check(tmp_path / "full/thesis.tex")
    with pytest.raises(UserError, match="cannot be written"):
        check(tmp_path / "full/thesis.tex/deeper")


# ---- the text of its training


def test_another_tokenizer_or_prompt_style_is_reported(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter", base)
    assert resolve(adapter).notices == []
    tokenizer = base / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    (said,) = resolve(adapter).notices
    assert f"{tokenizer}: is not the tokenizer that {adapter} was trained with, whose own is used" in said
    (adapter / "prompt_style.yaml").write_text("style: plain\n")
    shutil.copyfile(tokenizer, adapter / "tokenizer.json")
    first, second = resolve(adapter).notices
    assert "is not the tokenizer that this adapter was trained with" in first
    assert "says plain, but this adapter was trained with the prompt style alpaca" in second
    content = torch.load(adapter / "lit_model.pth", weights_only=True)
    del content["litlora"]["taught"]
    torch.save(content, adapter / "lit_model.pth")
    assert resolve(adapter).notices == [], "an adapter of before says nothing"


def test_the_fingerprint_samples_large_tensors_as_the_security_page_says(make_checkpoint):
    tensors = open_checkpoint(make_checkpoint("base", vocab_size=2000)).tensors
    name, table = "model.embed_tokens.weight", tensors["model.embed_tokens.weight"]
    bytes_in_all = table.nbytes

    def changed(change):
        other = table.clone()
        change(other.view(-1))
        return fingerprint({**tensors, name: other}) != fingerprint(tensors)

    assert changed(lambda flat: flat.add_(1e-3 * torch.randn_like(flat))), (
        "training changes nearly every number"
    )
    assert changed(lambda flat: flat[:1].add_(1)) and changed(lambda flat: flat[-1:].add_(1)), (
        "the ends are looked at"
    )
    between = (512 + bytes_in_all // 14) // 4  # in the middle of the first gap
    assert not changed(lambda flat: flat[between : between + 1].add_(1)), (
        "else SECURITY.md promises too little"
    )
