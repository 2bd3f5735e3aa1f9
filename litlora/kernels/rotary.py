"""Rotary positions (Su et al. 2021, arXiv:2104.09864), and the scalings that stretch them beyond
the context of training."""

import math
import threading

import torch
from torch import Tensor

from litlora.config import RopeScaling
from litlora.kernels.attention import Pack

Rope = tuple[Tensor, Tensor]
"""Cosines and sines (T, R) of the current positions, for the R rotated dimensions of a head."""


_computing = threading.Lock()
"""Held while a table is computed. When two threads call torch's cosine on the CPU for the first
time at once, one of them can get values that are off by 1e-4: about one verified merge in 60 was
refused for that, on two cores with torch 2.13."""


class RotaryTable:
    """Cosines and sines of position · frequency, kept for the longest sequence so far."""

    def __init__(self, dim: int, theta: float, scaling: RopeScaling | None, max_positions: int) -> None:
        self.dim, self.theta, self.scaling, self.max_positions = dim, theta, scaling, max_positions
        self._regime: int | None = None
        self._rows: Rope | None = None

    def rows(self, start: int, T: int, like: Tensor) -> Rope:
        """cos, sin (T, dim) of the positions start to start + T - 1, in the dtype and on the device
        of `like`."""
        length = start + T
        regime = self._regime_of(length)
        if (
            self._rows is None
            or regime != self._regime
            or self._rows[0].size(0) < length
            or self._rows[0].device != like.device
        ):
            self._regime = regime
            # The table outlives this call: one that generation computed must serve training too.
            with torch.inference_mode(False):
                self._rows = self._compute(length, like.device)
        cos, sin = self._rows
        return cos[start:length].to(like.dtype), sin[start:length].to(like.dtype)

    def packed_rows(self, pack: Pack, like: Tensor) -> Rope:
        """As rows, for packed sequences: the positions of each start at 0."""
        if len({self._regime_of(length) for length in pack.lengths}) == 1:
            self.rows(0, pack.longest, like)
            # The table has its own dtype: a row is picked, and then rounded as `rows` rounds it.
            cos, sin = (part.index_select(0, pack.places).to(like.dtype) for part in self._rows)
            return cos, sin
        cos, sin = zip(*(self.rows(0, length, like) for length in pack.lengths), strict=True)
        cos, sin = torch.cat(cos), torch.cat(sin)
        if pack.shared is not None:
            cos, sin = (part.index_select(0, pack.shared.kept) for part in (cos, sin))
        return cos, sin

    def rows_apart(self, places: list[int] | Tensor, like: Tensor) -> Rope:
        """As rows, of B sequences that get a token each, at these positions: (B, 1, 1, dim). For
        positions (B,) on the device, the rows must have been computed."""
        if isinstance(places, Tensor):
            cos, sin = (part.index_select(0, places).to(like.dtype) for part in self._rows)
        elif len({self._regime_of(place + 1) for place in places}) > 1:
            cos, sin = zip(*(self.rows(place, 1, like) for place in places), strict=True)
            cos, sin = torch.cat(cos), torch.cat(sin)
        else:
            self.rows(max(places), 1, like)
            index = torch.tensor(places, device=like.device)
            cos, sin = (part.index_select(0, index).to(like.dtype) for part in self._rows)
        return cos[:, None, None], sin[:, None, None]

    def _regime_of(self, length: int) -> int:
        """Lengths of one regime share their frequencies; with two of the scalings these depend on
        the length of the sequence."""
        kind = self.scaling.rope_type if self.scaling is not None else None
        if kind == "dynamic":
            return max(length, self.max_positions)
        return int(kind == "longrope" and length > self.scaling.original_max_position_embeddings)

    def _compute(self, length: int, device: torch.device) -> Rope:
        frequencies, factor = rotary_frequencies(
            self.dim, self.theta, self.scaling, self.max_positions, length
        )
        rows = -(-length // 256) * 256  # some in advance: generation asks for one more at a time
        places = torch.arange(rows, dtype=torch.float32, device=device)
        angles = torch.outer(places, frequencies.to(device)).repeat(1, 2)
        with _computing:
            return angles.cos() * factor, angles.sin() * factor


def rotary_frequencies(
    dim: int, theta: float, scaling: RopeScaling | None, max_positions: int, length: int
) -> tuple[Tensor, float]:
    """The angle between neighbouring positions for each rotated pair, theta^(-2i/dim) after
    scaling, (dim / 2,); and a factor for cos and sin.

    `length` is that of the sequence. Scalings: linear: Chen et al. 2023, arXiv:2306.15595; dynamic:
    NTK-aware, growing with the length; yarn: Peng et al. 2023, arXiv:2309.00071; longrope: Ding et
    al. 2024, arXiv:2402.13753; llama3: Llama 3.1; proportional: Gemma 4.
    """
    kind = scaling.rope_type if scaling is not None else None
    if kind == "dynamic" and length > max_positions:
        theta *= (scaling.factor * length / max_positions - (scaling.factor - 1)) ** (dim / (dim - 2))
    # fp32: a bf16 angle is off by whole turns at long range
    frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if kind == "proportional":
        frequencies[int(scaling.proportion * dim // 2) :] = 0
        return frequencies / scaling.factor, 1.0
    if kind == "linear":
        return frequencies / scaling.factor, 1.0
    if kind == "llama3":
        # Waves that turn often within the old context stay; those that hardly turn are stretched.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        width = scaling.high_freq_factor - scaling.low_freq_factor
        keep = ((turns - scaling.low_freq_factor) / width).clamp(0, 1)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor, 1.0
    if kind == "yarn":
        keep = _yarn_ramp(dim, theta, scaling)
        return keep * frequencies + (1 - keep) * frequencies / scaling.factor, scaling.attention_factor
    if kind == "longrope":
        long = length > scaling.original_max_position_embeddings
        divisors = torch.tensor(scaling.long_factor if long else scaling.short_factor)
        return frequencies / divisors, scaling.attention_factor
    return frequencies, 1.0


def _yarn_ramp(dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """How much of each pair's frequency stays, (dim / 2,): as llama3, with a ramp over the pair's
    number instead of its turns."""

    def pair_that_turns(times: float) -> float:
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    return 1 - ((torch.arange(dim // 2) - first) / max(last - first, 1e-3)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i+R/2}) of the first R dimensions of x (B, H, T, D) by its angle
    (T, R)."""
    if cos.size(-1) < x.size(-1):
        rotated, rest = x.split([cos.size(-1), x.size(-1) - cos.size(-1)], dim=-1)
        return torch.cat((rotate(rotated, cos, sin), rest), dim=-1)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def halves(x: Tensor, dim: int) -> Tensor:
    """x (..., D) with the pairs (x_2i, x_2i+1) of its first `dim` dimensions where `rotate` expects
    them, at i and i + dim/2. Products of queries and keys do not change."""
    pairs = x[..., :dim].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return pairs if dim == x.size(-1) else torch.cat((pairs, x[..., dim:]), dim=-1)
