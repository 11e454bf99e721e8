"""What every call of a compiled CUDA kernel needs: the module, types by number, the check of what a launch answers."""

from __future__ import annotations

from typing import Any

import torch

from engine.errors import BackendError
from engine.ops.backends import cuda_kernels
from engine.ops.spec import Spec

__all__ = ["DTYPES", "check", "kernels", "scale_dtype"]

DTYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # enum DType in csrc/ops.h


def kernels() -> Any:
    """The compiled CUDA module. Raises BackendError where it is missing."""
    module = cuda_kernels()
    if module is None:
        raise BackendError("the CUDA kernels are not built; install with -C cmake.define.CUDA=ON where nvcc is")
    return module


def check(status: str | None) -> None:
    """Raise BackendError with what a launch answered, if it failed."""
    if status is not None:
        raise BackendError(f"a CUDA kernel could not run: {status}")


def scale_dtype(spec: Spec) -> int:
    """The type of a layer's 16-bit scales; a kernel for NVFP4 does not ask."""
    return DTYPES.get(spec.sections["scales"].dtype, 0)
