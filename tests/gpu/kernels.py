"""Every CUDA kernel of Hopper once, at small sizes: what compute-sanitizer is run over.

    compute-sanitizer --tool memcheck --kernel-regex kns=nibble python tests/gpu/kernels.py

Inputs are made on the host, so that hardly any other kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine import ops
from engine.ops import cuda, sm80
from tests.ops.cases import Case, random_awq, random_linear, tokens
from tests.ops.test_wgmma64 import without_minus_eight


def on_device(value: ops.CanonicalLinear | ops.AwqWeight) -> dict:
    """Its tensors, there."""
    return {name: part.cuda() if isinstance(part, Tensor) else part for name, part in vars(value).items()}


def linears() -> None:
    """quantize_act, the widening and the product; rank 80 has two stages of the low-rank branch."""
    for case in (Case(96, 200, 320, 32), Case(1100, 448, 320, 80), Case(1030, 256, 3264, 32)):
        weight = without_minus_eight(random_linear(case))
        packed = ops.pack(ops.CanonicalLinear(**on_device(weight)), "sm90a")
        act = cuda._quantize(tokens(case, torch.bfloat16).cuda(), [(packed.blob, packed.spec)])[0]
        cuda._quantize(tokens(case, torch.bfloat16).cuda(), [(packed.blob, packed.spec)], form=2)
        wide = cuda._widen(act, packed.blob, packed.spec)
        cuda._multiply(act, wide, packed.blob, packed.spec, torch.bfloat16, gelu=True)
        stream = torch.zeros(1, case.m, case.n, dtype=torch.bfloat16).cuda()
        cuda._multiply(act, wide, packed.blob, packed.spec, torch.bfloat16, out=stream, gate=stream[:, 0].clone())


def passes() -> None:
    """The passes between the linears."""
    draw = torch.Generator().manual_seed(0)
    made = lambda *shape: torch.randn(*shape, generator=draw).bfloat16().cuda()  # noqa: E731
    weight = ops.pack(
        ops.CanonicalLinear(**on_device(without_minus_eight(random_linear(Case(1, 128, 320, 32))))), "sm90a"
    )
    ops.norm_quantize(made(2, 40, 320), made(2, 320), made(2, 320), 1e-6, [weight, weight], "fp8")
    ops.gated_add(made(2, 9, 320), made(2, 320), made(2, 9, 320), made(2, 9, 320))
    angles = torch.randn(14, 128, generator=draw).cuda()
    heads = ops.pack(
        ops.CanonicalLinear(**on_device(without_minus_eight(random_linear(Case(1, 384, 320, 32))))), "sm90a"
    )
    for count in (70, 1030):  # of both products
        act = cuda._quantize(made(count, 320), [(heads.blob, heads.spec)])
        turned = torch.randn(count, 128, generator=draw).cuda()
        ops.project_heads(act, [heads], [made(128), made(128)], turned, turned, 1e-6, 1)
    ops.rotate_heads(made(2, 9, 3 * 256), made(2, 5, 3 * 256), [made(128) for _ in range(4)], angles, angles, 1e-6)
    ops.attention_8bit(*(made(2, 270, 2, 128) for _ in range(3)))
    ops.depthwise_glu(made(2, 5, 19, 2 * 300), made(600, 1, 3, 3), made(600), 320)
    ops.linear_attention(made(2, 300, 3 * 96), 3)


def other_cards() -> None:
    """What serves every card from Ampere on."""
    case = Case(70, 100, 192, 16)
    packed = ops.pack(ops.CanonicalLinear(**on_device(random_linear(case))), "sm80")
    x = tokens(case, torch.bfloat16).cuda()
    for mode in ("int8", "int4", "uint4"):
        ops.linear(ops.quantize_act(x, packed, mode), packed, gelu=True)
        act = ops.quantize_act(x, packed, mode, pairs=True)
        for form in (1, 2):
            stream = torch.zeros(1, case.m, case.n, dtype=torch.bfloat16).cuda()
            sm80._multiply(act, packed.blob, packed.spec, stream, gate=stream[:, 0].clone(), form=form)
    awq = ops.AwqWeight(**on_device(random_awq(Case(3, 70, 192, 0))))
    ops.awq_linear(tokens(Case(3, 70, 192, 0), torch.bfloat16).cuda(), ops.pack_awq(awq, "sm80"))


if __name__ == "__main__":
    linears()
    passes()
    other_cards()
    torch.cuda.synchronize()
    print("every kernel ran")
