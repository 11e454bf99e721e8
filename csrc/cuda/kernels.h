// One name a CUDA kernel and architecture. `stream` is a cudaStream_t; a launch that fails comes back as a sentence.
#pragma once
#include "../ops.h"

namespace nibble {

// out (N,K) bf16 or fp16 <- codes (N,K/2) int4 in canonical order, scales (N,K/64) of the same 16-bit type.
struct DequantizeInt4 {
  const uint8_t* codes;
  const uint16_t* scales;
  uint16_t* out;
  int64_t n, k;
  DType dtype;
};

Status dequantize_int4_sm80(const DequantizeInt4&, void* stream);
Status dequantize_int4_sm90a(const DequantizeInt4&, void* stream);
Status dequantize_int4_sm120a(const DequantizeInt4&, void* stream);

// y (M,N) = weights x tokens in W4A8 with e4m3 tokens: sum_g scale_w[g] dot_g, * scale_act, + up x low_rank, + bias.
//   codes [N/64][K/64][128][16]: what thread t of a warpgroup feeds to wgmma; engine/ops/wgmma64.py draws it
//   wscales [N/64][K/64][64] 16-bit; row_most (N) fp32, a row's largest scale; up (N,R) bf16; bias (N) fp32; act
//   (M,k_valid) e4m3; act_scale (M) fp32 low_rank (M,R) bf16. n and k are padded to multiples of 128, y has n_valid
//   columns.
struct LinearFp8 {
  const uint8_t* codes;
  const uint16_t* wscales;
  const float* row_most;
  const uint16_t* up;
  const float* bias;
  const uint8_t* act;
  const float* act_scale;
  const uint16_t* low_rank;
  void* y;
  int64_t m, n, k, n_valid, k_valid, rank;
  DType scale_dtype, y_dtype;
  bool gelu;            // y = gelu(y), tanh form
  int tile;             // tokens of a tile: 64, 128 or 176 (128, 192, 224 or 256 where `wide` is given); 0 chooses
  const uint8_t* wide;  // what widen_fp8_sm90a wrote, on a 128-byte border, or null: pays for many tokens
  // Where given, y += gate * (what else were y): gate (samples,n_valid) bf16, rows gate_stride elements apart, one for
  // each tokens_per_sample tokens. y is bf16 then, and n_valid a multiple of 8.
  const uint16_t* gate;
  int64_t gate_stride, tokens_per_sample;
  // Where given, y are queries, keys and values of so many heads of 128 (n_valid = 384 heads), bf16; queries and keys
  // get their RMS norm (weights (128) bf16) and are turned by their token's angles. angles: (positions,64,2) fp16, the
  // cosine and sine of each pair; a sample's first token has position first_position.
  const void* angles;
  const uint16_t *norm_q, *norm_k;
  float eps;
  int heads, first_position;
};

// wide <- the weights of LinearFp8 in e4m3 with one scale a row, n * k bytes; behind them `up` divided by the rows'
// scales, n * 128 bytes for each 64 ranks, rounded up (divide.cuh). Members as there, row_scale is its row_most. NVFP4:
// codes are e2m1 in the same places, wscales [N/64][K/64][4][64] e4m3; row_most is without tensor and row factors.
struct WidenFp8 {
  const uint8_t* codes;
  const void* wscales;
  const float* row_most;
  const uint16_t* up;
  const float* row_scale;
  uint8_t* wide;
  int64_t n, k, rank;
  DType scale_dtype;
  bool nvfp4;
};

// A linear that reads the tokens of QuantizeFp8: inv_smooth (K) fp32 or null, down [K/32][R/16][2][32][8] bf16 (a
// lane's eight of an operand; engine/ops/wgmma64.py tells which) -> codes (M,K) e4m3, scales (M) fp32, low_rank (M,R)
// bf16.
struct QuantizeTarget {
  const float* inv_smooth;
  const void* down;
  uint8_t* codes;
  float* scales;
  void* low_rank;
  int64_t rank;
};

// Which kernel: every CTA a few tokens, CTAs that stay with their part of `down` (for many tokens), or CTAs alone on
// their multiprocessor with as many whole rows as it holds. What does not serve a shape leaves it to the first.
enum QuantizeForm { kChosen, kStreaming, kResident, kWholeRows };

// Tokens x (M,K) bf16, rows x_stride elements apart and on 16-byte borders, for one or two linears. Where `scale` is
// given: x = LayerNorm(x) * (1 + scale) + shift first; scale, shift: (samples,K) bf16, rows mod_stride elements apart,
// one row for each tokens_per_sample tokens.
struct QuantizeFp8 {
  const void* x;
  int64_t m, k, x_stride;
  const void *scale, *shift;
  float eps;
  int samples;
  int64_t tokens_per_sample, mod_stride;
  int targets;
  QuantizeTarget target[2];
  QuantizeForm form;
};

// out = x + gate * (y [+ y2]), all (M,K) bf16 and dense but gate: a row for each tokens_per_sample tokens, gate_stride
// elements apart, on 16-byte borders. K is a multiple of 8.
struct GatedAdd {
  const void *x, *gate, *y, *y2;
  void* out;
  int64_t m, k, tokens_per_sample, gate_stride;
};

// SANA's feed-forward between its linears: h = silu(x) convolved 3x3, each channel with itself, zeros around it; out =
// h[..C] * silu(h[C..]). x (batch,height,width,2C), weight (2C,3,3), bias (2C), out (batch,height,width,padded), zeros
// past C; all bf16 and dense, C and padded even.
struct DepthwiseGlu {
  const void *x, *weight, *bias;
  void* out;
  int batch, height, width, channels, padded;
};

// out (batch,tokens,heads*32) bf16 = SANA's linear attention of qkv (batch,tokens,3*heads*32) bf16, both dense and on
// 16-byte borders. sums: (batch,heads,tokens/run rounded up,33*32) fp32 to work in; `run` tokens are summed at a time.
struct LinearAttention {
  const void* qkv;
  float* sums;
  void* out;
  int64_t tokens, run;
  int batch, heads;
  float epsilon;
};

// What 16-bit attention reads, from the projections of a joint sequence: text tokens first, then the picture's. A row
// of text or picture is q, k, v of all heads (3 * heads * 128 bf16), rows `stride` elements apart; angles (tokens,64,2)
// as in LinearFp8. q, k, v: (batch, tokens, heads, 128) bf16, q and k after RMS norm and rotation; v may be null, where
// it is not wanted.
struct RotateHeads {
  const void *text, *picture;
  const void *norm_q, *norm_k, *text_norm_q, *text_norm_k;
  const void* angles;
  void *q, *k, *v;
  int64_t text_stride, picture_stride;
  int batch, heads, tokens, text_tokens;
  float eps;
};

// (batch, tokens, heads, 128) bf16: heads side by side, tokens and samples so many elements apart, on 16-byte borders.
struct HeadsView {
  const void* data;
  int64_t token_stride, batch_stride;
};

// out (batch, tokens, heads * 128) bf16 = softmax(scale q k^T) v, probabilities and v_scale v in e4m3. values (batch *
// heads * 128 * tokens rounded up to 128) bytes to work in.
struct Attention {
  HeadsView q, k, v;
  uint8_t* values;
  void* out;
  int64_t batch, heads, tokens;
  float scale, v_scale;
};

// NVFP4 weights as consumer Blackwell multiplies them, padded to N rounded up to 16; engine/ops/mma64.py draws them.
//   codes [N/16][K/64][32][16]; scales [N/16][K/64][8][2][4] e4m3; up [N/16][R/16][32][8], down [K/16][R/16][32][8],
//   both of `dtype`; inv_smooth (K), bias (N), factor (N) fp32: tensor scale times row factor
struct WeightFp4 {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint16_t* up;
  const uint16_t* down;
  const float* inv_smooth;
  const float* bias;
  const float* factor;
  int64_t n, k, rank;
  DType dtype;
};

// codes (M,K/2) e2m1, two a byte, the even input low; scales (M,K/16) e4m3, rows scale_stride bytes apart, a multiple
// of 16; low_rank (M,R) fp32 <- x (M,K) of the weight's dtype, rows x_stride elements apart.
//   t = x * inv_smooth;  over 16 inputs: scale = e4m3(min(max(max|t| * (1/6), 2^-9), 448)), code = e2m1(t * (1 /
//   scale)); with an infinity or NaN among them: scale NaN, codes 0.  low_rank = x @ down^T
struct QuantizeFp4 {
  const WeightFp4* w;
  const void* x;
  int64_t m, x_stride, scale_stride;
  uint8_t* codes;
  uint8_t* scales;
  float* low_rank;
};

// y (M,N) = factor * (codes * scales of tokens) @ (codes * scales of weights)^T + low_rank @ up^T + bias, low_rank
// rounded to the weight's dtype; sums in fp32; then GELU in its tanh form, if wanted.
struct LinearFp4 {
  const WeightFp4* w;
  const uint8_t* codes;
  const uint8_t* scales;
  const float* low_rank;
  int64_t m, scale_stride;
  void* y;
  DType y_dtype;
  bool gelu;
};

// Which matrix units multiply pairs of 4-bit codes. Chosen: INT4's where there are any (8.x), INT8's elsewhere. Both
// give the same bits.
enum ProductForm { kChosenProduct, kEightBitProduct, kFourBitProduct };

// Linear on a device. `pairs`: token codes are [M/16 rounded up][K/64][32][4] words of eight inputs with nibbles in the
// order of Weight's, two's complement, or 0..15 where the mode is uint4. Lane l has words 2q and 2q+1 (q = l % 4) of
// tokens r and r + 8 (r = l / 4): the first of both, then the second of both. Tokens past M may hold anything. Without
// pairs, a mode of 4 bits has its codes as bytes.
struct LinearSm80 {
  Linear of;
  bool pairs, gelu;  // gelu: y = gelu(y), tanh form, of y rounded to its type
  // Where given, y += gate * (what else were y, rounded), as GatedAdd does it: gate (samples,N) bf16, rows gate_stride
  // elements apart, one for each tokens_per_sample tokens; y is bf16.
  const uint16_t* gate;
  int64_t gate_stride, tokens_per_sample;
  ProductForm form;
};

// A layer of AwqLinears. Scales, zeros and bias lie so many bytes behind its codes; first_panel: panels of the layers
// before it; y (M,N) dense.
struct AwqLayer {
  const uint8_t* codes;
  void* y;
  uint32_t scales, zeros, bias;
  int n, first_panel;
  DType scale_dtype;
};

// AwqLinear for many layers that read the same tokens, in one launch: the same bits as one by one. The layers travel as
// parameters of the kernel, which hold 4 KB, so that no table has to be kept in device memory.
constexpr int kMostLayers = 96;

struct AwqLinears {
  const float* x;
  int64_t m, x_stride, k;
  DType y_dtype;
  int layers;
  AwqLayer layer[kMostLayers];
};
static_assert(sizeof(AwqLinears) <= 4096);

// Ampere and everything after it, on the layouts of ops.h ("panel16"): pointers there are device memory. Rows of x, and
// of token codes, begin on 16-byte borders. `pairs`: quantize_act writes 4-bit codes as LinearSm80 reads them.
Status quantize_act_sm80(const QuantizeAct&, bool pairs, void* stream);
Status linear_sm80(const LinearSm80&, void* stream);
Status awq_linear_sm80(const AwqLinear&, void* stream);
Status awq_linears_sm80(const AwqLinears&, void* stream);
Status gated_add_sm80(const GatedAdd&, void* stream);
Status rotate_heads_sm80(const RotateHeads&, void* stream);
Status depthwise_glu_sm80(const DepthwiseGlu&, void* stream);
Status linear_attention_sm80(const LinearAttention&, void* stream);

Status quantize_act_sm120a(const QuantizeFp4&, void* stream);
Status linear_sm120a(const LinearFp4&, void* stream);

Status widen_fp8_sm90a(const WidenFp8&, void* stream);
Status linear_fp8_sm90a(const LinearFp8&, void* stream);
Status quantize_fp8_sm90a(const QuantizeFp8&, void* stream);
Status attention_sm90a(const Attention&, void* stream);

}  // namespace nibble
