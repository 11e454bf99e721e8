"""CUDA kernels. Addresses and streams are int; None means that the launch worked. dtype: 0 bfloat16, 1 float16."""

def device_count() -> int: ...
def dequantize_int4_sm80(
    codes: int, scales: int, out: int, n: int, k: int, dtype: int, stream: int, /
) -> str | None: ...
def dequantize_int4_sm90a(
    codes: int, scales: int, out: int, n: int, k: int, dtype: int, stream: int, /
) -> str | None: ...
def dequantize_int4_sm120a(
    codes: int, scales: int, out: int, n: int, k: int, dtype: int, stream: int, /
) -> str | None: ...
def linear_fp8_sm90a(
    addresses: tuple[int, ...],
    sizes: tuple[int, ...],
    scale_dtype: int,
    y_dtype: int,
    gelu: bool,
    tile: int,
    gate: tuple[int, int, int] | None,
    heads: tuple[tuple[int, ...], float] | None,
    stream: int,
    /,
) -> str | None: ...
def widen_fp8_sm90a(
    addresses: tuple[int, ...],
    sizes: tuple[int, int, int],
    scale_dtype: int,
    nvfp4: bool,
    stream: int,
    /,
) -> str | None: ...
def quantize_fp8_sm90a(
    x: int,
    m: int,
    k: int,
    x_stride: int,
    targets: list[tuple[tuple[int, ...], int]],
    norm: tuple[int, int, int, int] | None,
    eps: float,
    stream: int,
    form: int,
    /,
) -> str | None: ...
def quantize_act_sm80(
    parts: tuple[int, ...],
    sizes: tuple[int, ...],
    x: int,
    x_dtype: int,
    x_stride: int,
    m: int,
    mode: int,
    pairs: bool,
    made: tuple[int, int, int],
    stream: int,
    /,
) -> str | None: ...
def linear_sm80(
    parts: tuple[int, ...],
    sizes: tuple[int, ...],
    addresses: tuple[int, int, int, int],
    m: int,
    mode: int,
    pairs: bool,
    y_dtype: int,
    gelu: bool,
    gate: tuple[int, int, int] | None,
    form: int,
    stream: int,
    /,
) -> str | None: ...
def awq_linear_sm80(
    parts: tuple[int, ...], sizes: tuple[int, ...], x: int, x_stride: int, m: int, y: int, y_dtype: int, stream: int, /
) -> str | None: ...
def awq_linears_sm80(
    layers: list[tuple[int, ...]], sizes: tuple[int, int, int], x: int, y_dtype: int, stream: int, /
) -> str | None: ...
def quantize_act_sm120a(
    parts: tuple[int, ...],
    sizes: tuple[int, ...],
    x: int,
    counts: tuple[int, int, int],
    codes: int,
    scales: int,
    low_rank: int,
    stream: int,
    /,
) -> str | None: ...
def linear_sm120a(
    parts: tuple[int, ...],
    sizes: tuple[int, ...],
    codes: int,
    scales: int,
    low_rank: int,
    counts: tuple[int, int],
    y: int,
    y_dtype: int,
    gelu: bool,
    stream: int,
    /,
) -> str | None: ...
def depthwise_glu_sm80(addresses: tuple[int, ...], sizes: tuple[int, ...], stream: int, /) -> str | None: ...
def linear_attention_sm80(
    addresses: tuple[int, ...], sizes: tuple[int, ...], epsilon: float, stream: int, /
) -> str | None: ...
def attention_sm90a(
    addresses: tuple[int, ...],
    strides: tuple[int, ...],
    sizes: tuple[int, int, int],
    scale: float,
    v_scale: float,
    stream: int,
    /,
) -> str | None: ...
