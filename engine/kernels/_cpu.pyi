"""CPU kernels. Addresses are int (Tensor.data_ptr()), strides are in elements; None means that it worked.

dtype: 0 bfloat16, 1 float16, 2 float32. mode: 0 int8, 1 int4, 2 uint4. isa: index into instruction_sets().
Layouts and formulas: csrc/ops.h.
"""

class Panels:
    def __init__(
        self, n: int, k: int, rank: int, scale_dtype: int, low_rank_dtype: int, offsets: tuple[int, ...]
    ) -> None: ...

def instruction_sets() -> list[tuple[str, bool, str]]: ...
def quantize_act(
    isa: int,
    panels: Panels,
    buffer: int,
    x: int,
    x_dtype: int,
    x_stride: int,
    m: int,
    mode: int,
    codes: int,
    scales: int,
    low_rank: int,
    threads: int,
    /,
) -> str | None: ...
def linear(
    isa: int,
    panels: Panels,
    buffer: int,
    codes: int,
    scales: int,
    low_rank: int,
    m: int,
    mode: int,
    y: int,
    y_dtype: int,
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> str | None: ...
def linear_scratch(isa: int, panels: Panels, m: int, threads: int, /) -> int: ...
def svdq_linear(
    isa: int,
    panels: Panels,
    buffer: int,
    x: int,
    x_dtype: int,
    x_stride: int,
    m: int,
    mode: int,
    y: int,
    y_dtype: int,
    scratch: int,
    scratch_bytes: int,
    threads: int,
    /,
) -> str | None: ...
def svdq_linear_scratch(isa: int, panels: Panels, m: int, mode: int, threads: int, /) -> int: ...
def awq_linear(
    isa: int,
    n: int,
    k: int,
    scale_dtype: int,
    buffer: int,
    offsets: tuple[int, ...],
    x: int,
    x_stride: int,
    m: int,
    y: int,
    y_dtype: int,
    threads: int,
    /,
) -> str | None: ...
