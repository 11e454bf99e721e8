// D (64 x T, fp32) (+)= A (64 x k) x B (k x T, shared memory), T tokens: m64nTk32 in e4m3, m64nTk16 in 16-bit floats. A
// comes from registers or from shared memory.
//
// PTX wants each of D's registers by name, and only macros write such lists: first the names (a row of eight each),
// then the operands behind them, then the functions. The numbers that a width is given are those of its inputs, which
// asm counts from the last of D's on.
#pragma once
#include <cstdint>

namespace nibble::sm90a {

#define WGMMA_ROW_0 "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_ROW_1 "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_ROW_2 "%16, %17, %18, %19, %20, %21, %22, %23"
#define WGMMA_ROW_3 "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_ROW_4 "%32, %33, %34, %35, %36, %37, %38, %39"
#define WGMMA_ROW_5 "%40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_ROW_6 "%48, %49, %50, %51, %52, %53, %54, %55"
#define WGMMA_ROW_7 "%56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_ROW_8 "%64, %65, %66, %67, %68, %69, %70, %71"
#define WGMMA_ROW_9 "%72, %73, %74, %75, %76, %77, %78, %79"
#define WGMMA_ROW_10 "%80, %81, %82, %83, %84, %85, %86, %87"
#define WGMMA_ROW_11 "%88, %89, %90, %91, %92, %93, %94, %95"
#define WGMMA_ROW_12 "%96, %97, %98, %99, %100, %101, %102, %103"
#define WGMMA_ROW_13 "%104, %105, %106, %107, %108, %109, %110, %111"
#define WGMMA_ROW_14 "%112, %113, %114, %115, %116, %117, %118, %119"
#define WGMMA_ROW_15 "%120, %121, %122, %123, %124, %125, %126, %127"

#define WGMMA_NAMES_4 WGMMA_ROW_0 ", " WGMMA_ROW_1 ", " WGMMA_ROW_2 ", " WGMMA_ROW_3
#define WGMMA_NAMES_8 WGMMA_NAMES_4 ", " WGMMA_ROW_4 ", " WGMMA_ROW_5 ", " WGMMA_ROW_6 ", " WGMMA_ROW_7
#define WGMMA_NAMES_11 WGMMA_NAMES_8 ", " WGMMA_ROW_8 ", " WGMMA_ROW_9 ", " WGMMA_ROW_10
#define WGMMA_NAMES_12 WGMMA_NAMES_11 ", " WGMMA_ROW_11
#define WGMMA_NAMES_14 WGMMA_NAMES_12 ", " WGMMA_ROW_12 ", " WGMMA_ROW_13
#define WGMMA_NAMES_16 WGMMA_NAMES_14 ", " WGMMA_ROW_14 ", " WGMMA_ROW_15

#define WGMMA_FOUR(how, i) how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3])
#define WGMMA_EIGHT(how, i) WGMMA_FOUR(how, i), WGMMA_FOUR(how, i + 4)
#define WGMMA_D_4(how) WGMMA_EIGHT(how, 0), WGMMA_EIGHT(how, 8), WGMMA_EIGHT(how, 16), WGMMA_EIGHT(how, 24)
#define WGMMA_D_8(how) \
  WGMMA_D_4(how), WGMMA_EIGHT(how, 32), WGMMA_EIGHT(how, 40), WGMMA_EIGHT(how, 48), WGMMA_EIGHT(how, 56)
#define WGMMA_D_11(how) WGMMA_D_8(how), WGMMA_EIGHT(how, 64), WGMMA_EIGHT(how, 72), WGMMA_EIGHT(how, 80)
#define WGMMA_D_12(how) WGMMA_D_11(how), WGMMA_EIGHT(how, 88)
#define WGMMA_D_14(how) WGMMA_D_12(how), WGMMA_EIGHT(how, 96), WGMMA_EIGHT(how, 104)
#define WGMMA_D_16(how) WGMMA_D_14(how), WGMMA_EIGHT(how, 112), WGMMA_EIGHT(how, 120)

#define WGMMA_TEXT(tokens, rows, kind, a, b, add, tail) \
  "{\n.reg .pred p;\nsetp.ne.b32 p, " add               \
  ", 0;\n"                                              \
  "wgmma.mma_async.sync.aligned.m64n" #tokens kind " {" WGMMA_NAMES_##rows "}, " a ", " b ", p, 1, 1" tail ";\n}"

// A from registers. d = add ? d + a b : a b
#define WGMMA_ADD_REGISTERS(name, tokens, rows, kind, tail, a0, a1, a2, a3, b_, add_)                                 \
  __device__ static void name(float (&d)[tokens / 2], const uint32_t (&a)[4], uint64_t b, int add) {                  \
    asm volatile(WGMMA_TEXT(tokens, rows, kind, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", "%" #b_, "%" #add_, tail) \
                 : WGMMA_D_##rows("+f")                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));                                     \
  }

// A from registers. d = a b; nothing is read from d, so it needs no first value.
#define WGMMA_NEW_REGISTERS(name, tokens, rows, kind, tail, a0, a1, a2, a3, b_)                                 \
  __device__ static void name(float (&d)[tokens / 2], const uint32_t (&a)[4], uint64_t b) {                     \
    asm volatile(WGMMA_TEXT(tokens, rows, kind, "{%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}", "%" #b_, "0", tail) \
                 : WGMMA_D_##rows("=f")                                                                         \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                         \
  }

// A from shared memory. d = add ? d + a b : a b
#define WGMMA_ADD_SHARED(name, tokens, rows, kind, tail, a_, b_, add_)                   \
  __device__ static void name(float (&d)[tokens / 2], uint64_t a, uint64_t b, int add) { \
    asm volatile(WGMMA_TEXT(tokens, rows, kind, "%" #a_, "%" #b_, "%" #add_, tail)       \
                 : WGMMA_D_##rows("+f")                                                  \
                 : "l"(a), "l"(b), "r"(add));                                            \
  }

#define WGMMA_REGISTERS(tokens, rows, a0, a1, a2, a3, b_, add_)                                 \
  WGMMA_ADD_REGISTERS(e4m3, tokens, rows, "k32.f32.e4m3.e4m3", "", a0, a1, a2, a3, b_, add_)    \
  WGMMA_ADD_REGISTERS(bf16, tokens, rows, "k16.f32.bf16.bf16", ", 0", a0, a1, a2, a3, b_, add_) \
  WGMMA_ADD_REGISTERS(fp16, tokens, rows, "k16.f32.f16.f16", ", 0", a0, a1, a2, a3, b_, add_)   \
  WGMMA_NEW_REGISTERS(e4m3_new, tokens, rows, "k32.f32.e4m3.e4m3", "", a0, a1, a2, a3, b_)

#define WGMMA_SHARED(tokens, rows, a_, b_, add_)                              \
  WGMMA_ADD_SHARED(e4m3, tokens, rows, "k32.f32.e4m3.e4m3", "", a_, b_, add_) \
  WGMMA_ADD_SHARED(bf16, tokens, rows, "k16.f32.bf16.bf16", ", 0, 0", a_, b_, add_)

template <int kTokens>
struct Wgmma;

template <>
struct Wgmma<64> {
  WGMMA_REGISTERS(64, 4, 32, 33, 34, 35, 36, 37)
};

template <>
struct Wgmma<128> {
  WGMMA_REGISTERS(128, 8, 64, 65, 66, 67, 68, 69)
  WGMMA_SHARED(128, 8, 64, 65, 66)
};

template <>
struct Wgmma<176> {
  WGMMA_REGISTERS(176, 11, 88, 89, 90, 91, 92, 93)
};

template <>
struct Wgmma<192> {
  WGMMA_SHARED(192, 12, 96, 97, 98)
};

template <>
struct Wgmma<224> {
  WGMMA_SHARED(224, 14, 112, 113, 114)
};

template <>
struct Wgmma<256> {
  WGMMA_SHARED(256, 16, 128, 129, 130)
};

}  // namespace nibble::sm90a
