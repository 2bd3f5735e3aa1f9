"""The names of dtypes."""

import torch

from litlora.storage.dtypes import DTYPES, dtype_name


def test_a_name_is_what_an_option_takes():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert DTYPES[dtype_name(dtype)] is dtype
    assert dtype_name(torch.int8) == "int8"
