"""One process or several (torchrun): who we are, and the few things processes tell each other."""

from __future__ import annotations

import dataclasses
import os

import torch
import torch.distributed as dist


@dataclasses.dataclass
class World:
    """This process among its `size` peers. `device` is its accelerator, or the CPU."""

    rank: int
    size: int
    device: torch.device

    @property
    def chief(self) -> bool:
        return self.rank == 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def average(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` by its mean over the processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
            tensor.div_(self.size)

    def broadcast(self, tensor: torch.Tensor) -> None:
        if self.size > 1:
            dist.broadcast(tensor, 0)

    def agree(self, value: float) -> float:
        """Rank 0's value, in every process. Waits for the device, so not for every step."""
        if self.size == 1:
            return value
        told = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return float(told.item())

    def barrier(self) -> None:
        self.agree(0.0)

    def close(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def without_cudnn_attention() -> None:
    """Leave attention to other kernels: on an H200 with torch 2.11 cuDNN's gave NaN gradients here and read outside its
    buffers."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def cores() -> int:
    """Processor cores that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2


def start(device: str = "auto") -> World:
    """Read torchrun's variables, choose the device, join the others.

    NVLink multicast stays off: on shared hosts it can take the whole host's GPUs down, and it gains nothing here.
    """
    for name, value in (("NCCL_NVLS_ENABLE", "0"), ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")):
        os.environ.setdefault(name, value)
    peers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(max(1, min(16, cores() // peers))))
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device, local) if device == "cuda" else torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
        without_cudnn_attention()
    if size > 1:
        cuda = where.type == "cuda"
        if not cuda:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: its own name need not resolve
        dist.init_process_group("nccl" if cuda else "gloo", **({"device_id": where} if cuda else {}))
    return World(rank, size, where)
