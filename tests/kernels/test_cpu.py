"""Compiled code for the CPU: what it computes beside float64, and how it is built."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import REPO

from litlora.frozen.few_rows import few_rows
from litlora.kernels import cpu, cpu_build
from litlora.kernels.attention import attend
from litlora.kernels.lora import ACTIVATIONS
from litlora.kernels.norm import rms_norm

pytestmark = pytest.mark.skipif(cpu.library() is None, reason=str(cpu_build.why_none()))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def off(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_a_token_are_as_exact_as_their_dtype(dtype):
    most = 6e-7 if dtype == torch.float32 else 3e-3
    with torch.inference_mode():
        for size in (8, 64, 520):
            x, weight = torch.randn(3, size).to(dtype), torch.randn(size)
            for own in (weight.to(dtype), weight):
                exact = F.rms_norm(x.double(), (size,), own.double(), 1e-6)
                assert cpu.rms_norm(x, own, 1e-6) is not None
                assert off(rms_norm(x, own, 1e-6), exact) < most
        assert cpu.rms_norm(torch.randn(3, 12), torch.randn(12), 1e-6) is None
    assert cpu.compiled_update(torch.randn(cpu.MOST_RANK + 1, 8), torch.randn(cpu.MOST_RANK + 1, 8)) is None
    assert cpu.compiled_update(torch.randn(2, 12), torch.randn(2, 8)) is None


def layer(sizes, dtype, rank=None, bias=True):
    """(the layer for compiled code, what it computes in float64)."""
    columns, rows = sizes
    W, b = torch.randn(rows, columns).to(dtype) * columns**-0.5, torch.randn(rows).to(dtype) if bias else None
    weight = few_rows(W)
    part, exact = cpu.Part(weight.compiled, (dtype,), b), W.double()
    if rank:
        A, Bt = torch.randn(rank, columns).to(dtype), torch.randn(rank, rows).to(dtype) / columns
        part = part.with_update(cpu.compiled_update(A, Bt), -0.5)
        exact = exact - 0.5 * Bt.double().t() @ A.double()
    return part, lambda x: F.linear(x.double(), exact, None if b is None else b.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [(1,), (2, 3)], ids=str)
def test_layers_of_one_input_are_as_exact_as_their_dtype(dtype, rows):
    most = 1e-6 if dtype == torch.float32 else 3e-3
    layers = [
        layer((96, 1000), dtype, rank=8),
        layer((96, 40), dtype, bias=False),
        layer((96, 24), dtype, rank=cpu.MOST_RANK, bias=False),
    ]
    parts, exact = zip(*layers, strict=True)
    x, down = torch.randn(*rows, 96).to(dtype), layer((1024, 96), dtype, rank=1)
    gate, up = layer((96, 1024), dtype, rank=3), layer((96, 1024), dtype)
    with torch.inference_mode():
        for _ in range(2):
            for chosen in (parts, parts[1:2]):
                found = cpu.project(x, chosen)
                for y, own in zip(found, exact if chosen is parts else exact[1:2], strict=True):
                    assert y.dtype == dtype and off(y, own(x)) < most
            x = x.flip(-1)
        alone, mlp = x.reshape(-1, 96)[:1], (gate[0], up[0], down[0])
        for activation in cpu.ACTIVATIONS:
            y = cpu.gated_mlp(x, mlp, activation)
            assert off(y, down[1](ACTIVATIONS[activation](gate[1](x)) * up[1](x))) < most
            # A sequence of a batch gets what it gets alone.
            assert torch.equal(cpu.gated_mlp(alone, mlp, activation), y.reshape(-1, 96)[:1])
        assert cpu.gated_mlp(x, mlp, "relu") is None
        found, one = cpu.project(x, parts), cpu.project(alone, parts)
        assert all(torch.equal(a.flatten(0, -2)[:1], b) for a, b in zip(found, one, strict=True))
        assert cpu.project(x.double(), parts) is None and cpu.project(x.expand(17, *x.shape), parts) is None
        x[..., 0] = torch.nan
        assert all(cpu.gated_mlp(x, mlp, activation).isnan().all() for activation in cpu.ACTIVATIONS)
    assert cpu.project(x, parts) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(8, 4, 100, 64, 64), (4, 4, 1, 8, 16), (16, 1, 65, 576, 512), (6, 2, 129, 40, 24)], ids=str
)
def test_attention_of_one_token_is_as_exact_as_its_dtype(dtype, sizes):
    H, G, S, D, E = sizes
    q = torch.randn(1, H, 1, D).to(dtype) * 3
    k, v = (torch.randn(1, G, S + 50, size).to(dtype)[:, :, 3 : S + 3] for size in (D, E))
    with torch.inference_mode():
        for sinks, cap in ((None, None), (torch.randn(H).to(dtype), None), (None, 2.0)):
            scores = (q.double().view(G, -1, D) @ k[0].double().transpose(1, 2) * D**-0.5).view(H, S)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.double()[:, None]], dim=1)
            shares = scores.softmax(dim=-1)[:, :S].view(G, -1, S)
            exact = (shares @ v[0].double()).view(1, H, 1, E)
            found = attend(q, k, v, None, scale=D**-0.5, sinks=sinks, softcap=cap)
            assert cpu.attend_one(q, k, v, sinks, D**-0.5, cap) is not None and found.dtype == dtype
            assert off(found, exact) < (1e-6 if dtype == torch.float32 else 4e-3)
            q[0, 1, 0, 0] = torch.nan  # stays visible
            bad = attend(q, k, v, None, scale=D**-0.5, sinks=sinks, softcap=cap).isnan().all(-1)[0, :, 0]
            assert bad.tolist() == [head == 1 for head in range(H)]
            q[0, 1, 0, 0] = 1


def test_what_is_not_finite_stays_so():
    odd = torch.tensor([0x7FFFFFFF, -1, 0x7F800001], dtype=torch.int32).view(torch.float32)  # NaN, any bits
    weight = torch.ones(32)
    weight[:3] = odd
    with torch.inference_mode():
        found = cpu.rms_norm(torch.ones(1, 32, dtype=torch.bfloat16), weight, 1e-6)
        assert found.isnan().tolist() == [[True] * 3 + [False] * 29]
        W = torch.ones(3, 32, dtype=torch.float16)
        W[0, 1], W[1, 2] = torch.inf, torch.nan
        y = few_rows(W).times(torch.ones(1, 32, dtype=torch.float16))
    assert y[0, 0] == torch.inf and y[0, 1].isnan() and y[0, 2] == 32


def test_halves_are_rounded_to_the_nearest():
    halves = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    halves = halves[halves.isfinite()].float().unique()
    between = (halves[1:] + halves[:-1]) / 2  # ties, to even
    more = torch.tensor([65519.996, 65520.0, 1e38, torch.inf, torch.nan, 2.0**-25, 1e-40])
    values = torch.cat(
        [halves, between, between.nextafter(halves[1:]), between.nextafter(halves[:-1]), more, -more]
    )
    values = F.pad(values, (0, -len(values) % 32)).view(-1, 32)
    written = torch.empty(values.shape, dtype=torch.float16)
    assert few_rows(values).compiled.write_to(written, torch.float32)
    assert written.isnan().sum() == 2
    same = written.view(torch.int16) == values.half().view(torch.int16)
    assert (same | written.isnan()).all()


def test_what_learns_and_what_does_not_suit_stays_with_torch():
    x, weight = torch.randn(3, 64), torch.randn(64)
    q, k = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 9, 16)
    assert cpu.rms_norm(x, weight, 1e-6) is None and cpu.attend_one(q, k, k, None, 0.25) is None
    with torch.inference_mode():
        assert cpu.is_plain(x) and cpu.is_few(x) and not cpu.is_few(torch.randn(17, 64))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not cpu.is_plain(x) and cpu.rms_norm(x, weight, 1e-6) is None
        assert cpu.attend_one(q, k, k.half(), None, 0.25) is None
        assert cpu.attend_one(q, k[..., ::2], k, None, 0.25) is None
        assert cpu.attend_one(q.expand(2, 4, 1, 16), k, k, None, 0.25) is None


def test_it_is_built_once_for_a_processor_and_its_compiler(tmp_path, monkeypatch):
    build, made = cpu_build.library.__wrapped__, tmp_path / "litlora/kernels"  # anew, each time
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_build, "FLAGS", (*cpu_build.FLAGS, "-O0"))
    assert build().is_new
    [file] = made.iterdir()
    before = file.stat().st_mtime_ns
    assert not build().is_new and [file] == [*made.iterdir()] and file.stat().st_mtime_ns == before
    monkeypatch.setenv("XDG_CACHE_HOME", str(file / "below"))  # where nothing can be written
    assert build() is not None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cpu_build, "FLAGS", ("--no-such-flag",))
    assert build() is None and [file] == [*made.iterdir()]
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(cpu_build, "library", build)
    assert build() is None
    assert (
        cpu_build.why_none()
        == "the C compiler no-such-compiler could not build cpu.c, or its result could not be loaded"
    )
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "")
    assert cpu_build.why_none() == "no C compiler was found (cc, gcc, clang, or $CC)"


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("-march=native",), ("-march=native", "-mno-fma")], ids=str)
def test_code_for_other_processors_gives_the_same_values(flags, tmp_path):
    # Those without AVX2 go by plain C.
    program = f"""
import sys
sys.path[:0] = ["tests", "tests/frozen", "tests/kernels"]
from litlora.kernels import cpu, cpu_build
cpu_build.TRIED = ({flags!r},)
assert cpu.library() is not None
import pytest
sys.exit(pytest.main(["-q", "-n", "0", "-p", "no:cacheprovider", "tests/frozen/test_few_rows.py",
                      "tests/kernels/test_cpu.py", "tests/model/test_compiled.py",
                      "-k", "not built and not other_processors"]))
"""
    environment = {"PATH": "/usr/bin:/bin", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    environment["OMP_NUM_THREADS"] = "1"  # without threads of its own, plain weights would stay with torch
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
