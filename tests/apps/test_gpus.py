"""GPU memory on the page: GPUtil's figures, torch's where it fails, nothing where neither can tell."""

from __future__ import annotations

from types import SimpleNamespace

import GPUtil
import pytest
import torch

from apps.common import gpus


def test_the_figures_are_those_of_the_device(monkeypatch):
    cards = [SimpleNamespace(id=i, memoryUsed=2048.0 * (i + 1), memoryTotal=81920.0) for i in range(2)]
    monkeypatch.setattr(GPUtil, "getGPUs", lambda: cards)
    assert gpus.memory("cuda") == "2.0 of 80.0 GiB"
    assert gpus.memory("cuda:1") == "4.0 of 80.0 GiB"


@pytest.mark.parametrize("found", [[], ValueError("nvidia-smi said something else")])
def test_torch_is_asked_where_gputil_fails(monkeypatch, found):
    def answer():
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(GPUtil, "getGPUs", answer)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (60 * 2**30, 80 * 2**30))
    assert gpus.memory("cuda:0") == "20.0 of 80.0 GiB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_nothing_to_say():
    assert gpus.memory("cuda") == ""
