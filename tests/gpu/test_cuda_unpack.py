"""The CUDA kernels that widen INT4 codes, against the reference. The launch without a device is tested everywhere."""

from __future__ import annotations

import pytest
import torch

from engine import ops
from engine.ops import backends
from tests.ops.cases import Case, random_linear

CODES = {torch.bfloat16: 0, torch.float16: 1}
KERNELS = {"sm80": (8, 0), "sm90a": (9, 0), "sm120a": (12, 0)}


@pytest.fixture
def module():
    compiled = backends.cuda_kernels()
    if compiled is None:
        pytest.skip("the CUDA module was not built (no nvcc)")
    return compiled


def test_without_a_device_the_launch_says_so(module):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    assert module.device_count() == 0
    assert "CUDA" in module.dequantize_int4_sm80(0, 0, 0, 16, 64, 0, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("case", [Case(1, 1, 64, 0), Case(1, 33, 192, 0), Case(1, 3072, 3072, 0)], ids=str)
@pytest.mark.parametrize("architecture", KERNELS)
def test_dense_weights_are_exact(module, architecture: str, case: Case, dtype: torch.dtype):
    capability = torch.cuda.get_device_capability()
    wanted = KERNELS[architecture]
    if capability != wanted and not (architecture == "sm80" and capability >= wanted):
        pytest.skip(f"{architecture} code does not run on capability {capability}")
    weight = random_linear(case, dtype)
    codes, scales = weight.codes.cuda(), weight.wscales.cuda()
    out = torch.full((case.n, case.k), torch.nan, dtype=dtype, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    status = getattr(module, f"dequantize_int4_{architecture}")(
        codes.data_ptr(), scales.data_ptr(), out.data_ptr(), case.n, case.k, CODES[dtype], stream.cuda_stream
    )
    assert status is None
    stream.synchronize()
    assert torch.equal(out.cpu(), ops.dequantize(weight).to(dtype))
    assert module.device_count() == torch.cuda.device_count()
