// The little that all device code shares. It compiles with nvcc, and with g++ for tests on a CPU:
// tests/support/cuda_on_cpu.h then stands in for CUDA, with threads that really meet at barriers.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define TAB_DEVICE __device__ __forceinline__
#define TAB_UNROLL _Pragma("unroll")
#define TAB_ROLLED _Pragma("unroll 1")
#define TAB_UNROLL_AHEAD _Pragma("unroll (AHEAD)")
#else
#include "cuda_on_cpu.h"
#define TAB_DEVICE inline
#define TAB_UNROLL
#define TAB_ROLLED
#define TAB_UNROLL_AHEAD
#endif

namespace tab::few {

constexpr int MAX_TOKENS = 64;
constexpr unsigned ALL_LANES = 0xffffffffu;

TAB_DEVICE float wide(float x) { return x; }
TAB_DEVICE float wide(__half x) { return __half2float(x); }
TAB_DEVICE float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
TAB_DEVICE void narrow(float x, float* to) { *to = x; }
TAB_DEVICE void narrow(float x, __half* to) { *to = __float2half(x); }
TAB_DEVICE void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }

/// The first n rows of a tensor or, where a mask is given, those of them that are real.
struct Tokens {
  int n;
  const uint8_t* mask;  // (N) or null
  TAB_DEVICE Tokens(int n, const uint8_t* mask = nullptr) : n(n), mask(mask) {}
  /// Of batch entry b, for a mask (B, N)
  static TAB_DEVICE Tokens of(int n, const uint8_t* mask, int b) {
    return {n, mask == nullptr ? nullptr : mask + static_cast<int64_t>(b) * n};
  }
  TAB_DEVICE bool operator()(int i) const { return i < n && (mask == nullptr || mask[i] != 0); }
};

/// max(x, 0), NaN where x is
TAB_DEVICE float rectified(float x) { return x < 0 ? 0.0f : x; }
/// The larger one, NaN if either is
TAB_DEVICE float larger(float x, float y) { return x != x || x > y ? x : y; }

/// A (B, H, N, D) tensor: its strides in elements; the last one is 1. h is 0 where heads share.
template <typename T>
struct Heads {
  T* data;
  int64_t b, h, n;
  TAB_DEVICE T* at(int bh, int heads) const { return data + (bh / heads) * b + (bh % heads) * h; }
};

}  // namespace tab::few
