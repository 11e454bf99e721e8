"""How full a GPU is: from GPUtil, which asks the driver, or from torch where that does not work."""

from __future__ import annotations

import torch

__all__ = ["memory"]

MIB = 2**20


def memory(device: str) -> str:
    """What all programs together hold of a CUDA device, as "21.4 of 139.7 GiB"; empty where nobody can tell."""
    index = torch.device(device).index or 0
    try:
        import GPUtil

        found = next(gpu for gpu in GPUtil.getGPUs() if gpu.id == index)
        used, total = found.memoryUsed * MIB, found.memoryTotal * MIB
    except Exception:  # no driver tool, a container without it, another numbering: torch knows at least its own view
        try:
            free, total = torch.cuda.mem_get_info(index)
        except (RuntimeError, AssertionError):
            return ""
        used = total - free
    return f"{used / 2**30:.1f} of {total / 2**30:.1f} GiB"
