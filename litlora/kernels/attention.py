"""Causal attention of one sequence, or of several packed ones, each of which sees itself alone.

Shapes: B batch, T tokens, S tokens seen, H heads, G key/value heads, D head_dim; N tokens of a
pack, all sequences together.
"""

import inspect
import math
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Required, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from litlora.kernels import cpu
from litlora.kernels.buckets import bucket
from litlora.kernels.cross_entropy import exact_dtype
from litlora.kernels.flex_attention import flex_packed_attention

CPU = torch.device("cpu")
QUERIES = 256
"""Rows of scores that exist at a time: few enough to skip most of the masked ones, enough for
multiplications at full speed."""
SINK_DIMS = 8
"""Dimensions that a sink adds to queries and keys: one is used, and CUDA's kernels want multiples."""
WINDOWED_QUERIES = 512
"""Queries of a long sequence that look through a window together: what they see, with the window
before them, is small against all pairs of tokens."""
LARGEST_MASK = 2**24
"""Pairs of tokens of which a mask is made in one piece on the CPU."""
VARLEN_HEAD = 256
"""The largest head of flash attention."""


class Scores(TypedDict, total=False):
    """The settings of `attend`."""

    scale: Required[float]
    softcap: float | None
    sinks: Tensor | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ) v: q (B, H, T, D), k (B, G, S, D) and v (B, G, S, E) -> (B, H, T, E).

    mask (T, S), or (B, 1, 1, S) of one token, is True where a token sees. Without one and with
    T > 1, T = S and attention is causal. With a softcap the scores are cap · tanh(scores / cap)
    (Gemma 2). With sinks (H,), and then without a softcap, the softmax of each head has that score,
    too, of a value that is zero
    (gpt-oss).
    """
    one = mask is None and q.size(2) == 1
    if one and (y := cpu.attend_one(q, k, v, sinks, scale, softcap)) is not None:
        return y
    if q.size(2) == 1 and softcap is None and not (mask is None and sinks is None):
        return _of_one(q, k, v, mask, sinks, scale)
    if sinks is not None:
        return _sinking(q, k, v, mask, sinks, scale)
    if softcap is None:
        # To a compiler the comparison is a symbol; SDPA wants a bool.
        causal = True if mask is None and q.size(2) > 1 else False
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.size(1) != k.size(1)
        )
    # (B, G, S, D) -> (B, H, S, D)
    k, v = (part.repeat_interleave(q.size(1) // part.size(1), dim=1) for part in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(2, 3) * (scale / softcap))  # (B, H, T, S)
    T = q.size(2)
    if mask is None and T > 1:
        mask = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(dim=-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v


def _of_one(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, scale: float
) -> Tensor:
    """`attend` of one token, without a copy of the keys for each head."""
    B, H, _, D = q.shape
    scores = q.view(B, k.size(1), -1, D) @ k.transpose(2, 3) * scale  # (B, G, H / G, S)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, k.size(1), -1, 1).expand(B, -1, -1, -1)
        scores = torch.cat([scores, sink], dim=-1)
    shares = scores.softmax(dim=-1, dtype=torch.promote_types(v.dtype, torch.float32))[..., : k.size(2)]
    return (shares.to(v.dtype) @ v).view(B, H, 1, -1)


def _sinking(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor, scale: float) -> Tensor:
    """`attend` with sinks of several tokens, by SDPA: a key in front of all others, whose value is zero,
    has one dimension more, in which each head's queries hold its sink."""
    (B, _, T, D), more = q.shape, SINK_DIMS
    sink = (sinks.to(torch.promote_types(q.dtype, torch.float32)) / scale).to(q.dtype)
    sink = F.pad(sink[:, None], (0, more - 1))[None, :, None].expand(B, -1, T, -1)
    q, k, v = torch.cat([q, sink], dim=-1), F.pad(k, (0, more, 1, 0)), F.pad(v, (0, more, 1, 0))
    k[:, :, 0, D] = 1
    if mask is None:  # a query more: SDPA's triangle needs as many as there are keys
        return attend(F.pad(q, (0, 0, 1, 0)), k, v, None, scale=scale)[:, :, 1:, :-more]
    return attend(q, k, v, F.pad(mask, (1, 0), value=True), scale=scale)[..., :-more]


def attend_apart(
    q: Tensor,
    seen: Sequence[tuple[Tensor, Tensor]],
    *,
    window: int | None = None,
    chunk: int | None = None,
    **scores: Unpack[Scores],
) -> Tensor:
    """Attention of B sequences that get a token each: q (B, H, 1, D), and of each sequence keys and
    values (1, G, S, D) of any S, of which it sees what `last_seen` gives -> (B, H, 1, D). `scores` as
    of `attend`.

    Each is computed by itself: nothing is padded, and the result is that of the sequence alone.
    """
    rows = zip(q.split(1), seen, strict=True)
    return torch.cat([attend(row, *last_seen(k, v, window, chunk), None, **scores) for row, (k, v) in rows])


def last_seen(k: Tensor, v: Tensor, window: int | None, chunk: int | None) -> tuple[Tensor, Tensor]:
    """The keys and values (B, G, S, D) that the last of S tokens sees: all, those in the window, or
    those of its chunk."""
    first = first_seen(k.size(2), window, chunk)
    return (k[:, :, first:], v[:, :, first:]) if first else (k, v)


def first_seen(S: int, window: int | None, chunk: int | None) -> int:
    """The number of the first token that the last of S tokens sees."""
    if chunk is not None:
        return (S - 1) // chunk * chunk
    return 0 if window is None else max(0, S - window)


def causal_mask(
    T: int, start: int, window: int | None, device: torch.device, chunk: int | None = None
) -> Tensor | None:
    """Which of start + T tokens each of the last T sees, (T, start + T); None where attention needs
    no mask.

    Without a past and within the window, or the first chunk, the mask is SDPA's own triangle; a single
    token sees all keys that it is given.
    """
    if T == 1 or (start == 0 and (window is None or T <= window) and (chunk is None or T <= chunk)):
        return None
    mask = torch.ones(T, start + T, dtype=torch.bool, device=device).tril(start)
    if chunk is not None:
        number = torch.arange(start + T, device=device) // chunk
        mask &= number[start:, None] == number
    return mask if window is None else mask.triu(start - window + 1)


class Shared(NamedTuple):
    """Sequences that begin with the same tokens, which are computed once: only attention sees each
    sequence whole. N places of all sequences, N' tokens computed."""

    copies: Tensor
    """(N,): the token at each place."""
    kept: Tensor
    """(N',): a place of each token."""

    def padded(self, size: int) -> "Shared":
        """With tokens of their own added, to N' = size."""
        copies, kept = self
        more = torch.arange(size - len(kept), device=kept.device)
        return Shared(torch.cat([copies, more + len(kept)]), torch.cat([kept, more + len(copies)]))


class Pack:
    """Several sequences in one row, of these lengths, and what the layers share of them. Its tensors
    are copied to the device once, and without waiting for it."""

    def __init__(self, lengths: list[int], shared: Shared | None = None, device: torch.device = CPU) -> None:
        self.lengths, self.shared, self.device = lengths, shared, device
        self.whole = self if shared is None else Pack(lengths, device=device)
        """The same sequences, none of which shares a token."""
        self.is_one = len(lengths) == 1
        self.ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        """(sequences + 1,), in the host's memory: where each begins, and where the last one ends."""
        self.longest = max(lengths, default=0)
        self.has_varlen = has_varlen(device)
        self.block_masks: dict[int | None, Any] = {}
        """FlexAttention's, by window."""
        self._chunked: dict[int, Pack] = {}

    def in_chunks(self, size: int | None) -> "Pack":
        """The same tokens, of which each chunk of this size is a sequence."""
        if size is None or self.longest <= size:
            return self
        if size not in self._chunked:
            starts = [(length, start) for length in self.lengths for start in range(0, length, size)]
            lengths = [min(size, length - start) for length, start in starts]
            self._chunked[size] = Pack(lengths, self.shared, self.device)
        return self._chunked[size]

    @cached_property
    def bounds(self) -> Tensor:
        """`ends` on the device, with empty sequences after the last one up to a multiple of 16: few
        sizes, for which little has to be compiled."""
        empty = -len(self.lengths) % 16
        return to_device(F.pad(self.ends, (0, empty), value=sum(self.lengths)), self.device)

    @cached_property
    def places(self) -> Tensor:
        """(N',), or (N,) if no token is shared: the position of each token in its sequence."""
        bounds = self.bounds.to(torch.int64)
        N = sum(self.lengths)
        starts = bounds[:-1].repeat_interleave(bounds.diff(), output_size=N)
        found = torch.arange(N, device=self.device) - starts
        return found if self.shared is None else found.index_select(0, self.shared.kept)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy of what was made on the host; it waits for nothing that is queued on a GPU."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


@cache
def has_varlen(device: torch.device) -> bool:
    """Whether torch computes attention of packs on this device by flash attention, with grouped
    queries and a window: from torch 2.13, on GPUs of NVIDIA's with bf16."""
    if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= inspect.signature(varlen_attn).parameters.keys()


def plain_packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    window: int | None = None,
    **scores: Unpack[Scores],
) -> Tensor:
    """Attention of packed sequences, each by itself: q (1, H, N, D), k and v (1, G, N, D) ->
    (1, H, N, D)."""
    parts = zip(*(part.split(pack.lengths, dim=2) for part in (q, k, v)), strict=True)
    outputs = []
    for part, T in zip(parts, pack.lengths, strict=True):
        if window is not None and T > window and (T**2 > LARGEST_MASK or q.device.type != "cpu"):
            outputs.append(_windowed(*part, window, **scores))
            continue
        size = bucket(T, q, least=32, parts=8)
        if size != T:  # no token sees what comes after it
            part = [F.pad(tensor, (0, 0, 0, size - T)) for tensor in part]
        outputs.append(attend(*part, causal_mask(size, 0, window, q.device), **scores)[:, :, :T])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, window: int, **scores: Unpack[Scores]) -> Tensor:
    """`attend` of one long sequence, in blocks of queries and of what these see."""
    outputs = []
    for i in range(0, q.size(2), WINDOWED_QUERIES):
        j = min(q.size(2), i + WINDOWED_QUERIES)
        first = max(0, i - window + 1)
        mask = torch.ones(j - i, j - first, dtype=torch.bool, device=q.device).tril(i - first)
        mask = mask.triu(i - first - window + 1)
        outputs.append(attend(q[:, :, i:j], k[:, :, first:j], v[:, :, first:j], mask, **scores))
    return torch.cat(outputs, dim=2)


class Case(NamedTuple):
    """What the choice of a way to compute `packed_attention` depends on."""

    device: str
    dtype: torch.dtype
    head_dim: int
    is_one: bool
    """Whether the pack is a single sequence."""
    within: bool
    """Whether no sequence is longer than the window."""
    plain_scores: bool
    """Whether there is neither a softcap nor a sink."""
    has_varlen: bool
    needs_backward: bool


def choose(case: Case) -> Literal["one", "varlen", "flex", "matrix", "plain"]:
    """The fastest way that has all that is asked for. None of the ways on a GPU keeps the scores of
    all pairs of tokens in bf16; the plain one does not in fp32 either."""
    half = case.dtype in (torch.bfloat16, torch.float16)
    if case.device == "cuda":
        if not case.plain_scores:
            return "flex"
        if case.is_one and case.within:
            return "one"  # cuDNN's kernel where torch prefers it: on an H100, from torch 2.13
        fits = case.head_dim <= VARLEN_HEAD and case.head_dim % 8 == 0
        return "varlen" if half and fits and case.has_varlen else "plain"
    is_bf16_cpu = case.device == "cpu" and case.dtype == torch.bfloat16
    return "matrix" if is_bf16_cpu and case.needs_backward and case.within and case.plain_scores else "plain"


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pack: Pack,
    *,
    window: int | None = None,
    chunk: int | None = None,
    **scores: Unpack[Scores],
) -> Tensor:
    """As plain_packed_attention, in the way that `choose` names. With `chunk`, a token sees those of its
    chunk alone. Where sequences share tokens, N is the number of these: attention alone computes them
    once a sequence."""
    pack = pack.in_chunks(chunk)
    if pack.shared is not None:
        q, k, v = (part.index_select(2, pack.shared.copies) for part in (q, k, v))
        whole = packed_attention(q, k, v, pack.whole, window=window, **scores)
        return whole.index_select(2, pack.shared.kept)
    case = Case(
        device=q.device.type,
        dtype=q.dtype,
        head_dim=q.size(-1),
        is_one=pack.is_one,
        within=window is None or pack.longest <= window,
        plain_scores=scores.get("softcap") is None and scores.get("sinks") is None,
        has_varlen=pack.has_varlen,
        needs_backward=torch.is_grad_enabled(),
    )
    way = choose(case)
    if way == "one":
        return attend(q, k, v, None, **scores)
    if way == "varlen":
        return varlen_packed_attention(q, k, v, pack, window=window, scale=scores["scale"])
    if way == "flex":
        return flex_packed_attention(q, k, v, pack, window=window, **scores)
    if torch.compiler.is_compiling():  # as one operation: the compiler would follow every length
        return torch.ops.litlora.packed_attention(q, k, v, pack.ends, window, scores["scale"])
    if way == "matrix":
        return matrix_packed_attention(q, k, v, pack, scale=scores["scale"])
    return plain_packed_attention(q, k, v, pack, window=window, **scores)


def varlen_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, window: int | None = None, scale: float
) -> Tensor:
    """As plain_packed_attention, by one kernel of flash attention (Dao 2023, arXiv:2307.08691)."""
    from torch.nn.attention.varlen import varlen_attn

    rows = (part[0].transpose(0, 1) for part in (q, k, v))  # (N, H, D)
    longest = -(-pack.longest // 128) * 128  # a bound: few of them, for which little is compiled
    seen = (-1, 0) if window is None else (window - 1, 0)
    grouped = q.size(1) != k.size(1)
    bounds = (pack.bounds, pack.bounds, longest, longest)
    y = varlen_attn(*rows, *bounds, scale=scale, window_size=seen, enable_gqa=grouped)
    return y.transpose(0, 1)[None]


def matrix_packed_attention(q: Tensor, k: Tensor, v: Tensor, pack: Pack, *, scale: float) -> Tensor:
    """As plain_packed_attention without a window, with a backward of matrix multiplications, which
    in bf16 takes half to two thirds of SDPA's time."""
    return _PackedAttention.apply(q, k, v, pack.lengths, scale)


class _PackedAttention(torch.autograd.Function):
    """The backward is that of Dao et al. 2022 (arXiv:2205.14135, section 3.1), in blocks of
    queries."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        output = torch.empty_like(q)
        log_sums = q.new_empty(q.shape[:3], dtype=exact_dtype(q))  # (1, H, N): of each query's exponentials
        start = 0
        for T in lengths:
            part = (_sequence(x, start, T) for x in (q, k, v))
            y, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *part, 0.0, True, scale=scale
            )
            output[:, :, start : start + T] = y[:, :, :T]
            log_sums[:, :, start : start + T] = log_sum[:, :, :T]
            start += T
        ctx.save_for_backward(q, k, v, output, log_sums)
        ctx.lengths, ctx.scale = lengths, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, log_sums = ctx.saved_tensors
        (_, H, _, D), G, exact = q.shape, k.size(1), exact_dtype(q)
        # With p = exp(s - log_sum), the gradient of the scores s is p · (upstream vᵀ - delta). The
        # multiplications compute both differences, through two more columns: bf16 then rounds
        # values that are small where p is large, and errs no more than in p itself.
        delta = (upstream.to(exact) * output).sum(-1)
        power = 2.0 ** round(math.log2(ctx.scale))  # q times a power of two is not rounded
        rest = ctx.scale / power
        rows, up_rows = _with(q * power, log_sums / rest), _with(upstream, delta)  # (1, H, N, D + 2)
        keys, values = (F.pad(x, (0, 2), value=-1.0) for x in (k, v))  # (1, G, N, D + 2)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=exact), torch.zeros_like(v, dtype=exact)
        start = 0
        for T in ctx.lengths:
            parts = [_sequence(x, start, T) for x in (rows, up_rows, keys, values)]
            for i in range(0, T, QUERIES):
                # Queries i to j see keys 0 to j; queries that share a key become rows of one
                # matrix.
                j = min(parts[0].size(2), i + QUERIES)
                x, up = (part[:, :, i:j].reshape(G, H // G * (j - i), D + 2) for part in parts[:2])
                key, value = (part[0, :, :j] for part in parts[2:])
                p = torch.bmm(x, key.transpose(1, 2))  # (G, H / G · (j - i), j)
                p = (p if rest == 1 else p.mul_(rest)).exp_()
                p.view(H, j - i, j).tril_(i)
                ds = torch.bmm(up, value.transpose(1, 2)).mul_(p)
                seen, own = slice(start, start + min(j, T)), slice(start + i, start + min(j, T))
                dq[0, :, own] = torch.bmm(ds, key[..., :D]).view(H, j - i, D)[:, : T - i]
                dk[0, :, seen] += torch.bmm(ds.transpose(1, 2), x[..., :D])[:, :T]
                dv[0, :, seen] += torch.bmm(p.transpose(1, 2), up[..., :D])[:, :T]
            start += T
        return dq.mul_(ctx.scale), dk.mul_(rest).to(k.dtype), dv.to(v.dtype), None, None


def _sequence(x: Tensor, start: int, T: int) -> Tensor:
    """T tokens of x (1, H, N, D), with zeros after them up to a bucket: no token sees what comes
    after it."""
    x = x[:, :, start : start + T]
    size = bucket(T, x, least=32, parts=8)
    return x if size == T else F.pad(x, (0, 0, 0, size - T))


def _with(x: Tensor, y: Tensor) -> Tensor:
    """x (1, H, N, D) and two more columns of its dtype, whose sum is y (1, H, N), in bf16 to 16
    bits: (1, H, N, D + 2)."""
    high = y.to(x.dtype)
    return torch.cat([x, high[..., None], (y - high).to(x.dtype)[..., None]], dim=-1)
