// What every op of TAB shares, CPU and CUDA: checks of arguments, strided views, outputs.
//
// Only the LibTorch stable ABI is used (TORCH_TARGET_VERSION, torch 2.11), so one build runs on
// every later torch. The Python side has validated the user's input; the checks here guard the
// memory when somebody calls torch.ops.tab.* directly.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "empty.h"

// Always inlined, so that a kernel compiled for another instruction set than the rest may call it.
#define TAB_INLINE static inline __attribute__((always_inline))

namespace tab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

/// ⌈n / by⌉
TAB_INLINE constexpr int64_t ceiling(int64_t n, int64_t by) { return (n + by - 1) / by; }
/// n rounded up to a multiple of `to`.
TAB_INLINE constexpr int64_t up(int64_t n, int64_t to) { return ceiling(n, to) * to; }

// --- checks ---------------------------------------------------------------------------------------

inline void check_shape(const char* op, const char* name, const Tensor& x,
                        std::initializer_list<int64_t> want) {
  bool same = x.dim() == static_cast<int64_t>(want.size());
  int64_t i = 0;
  for (int64_t size : want) same = same && x.size(i++) == size;
  STD_TORCH_CHECK(same, op, ": ", name, " has the wrong shape");
}

inline void check_dtype(const char* op, const char* name, const Tensor& x, ScalarType want) {
  STD_TORCH_CHECK(x.scalar_type() == want, op, ": ", name, " has the wrong dtype");
}

/// float32 for the half types, else the type itself: what sums and states are kept in.
inline ScalarType accumulator(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

/// q (B, H, N, D), k like it and v (B, H, N, Dv), of one type. Where kernels read groups of heads, k
/// and v may have fewer, whose number divides H; in cross-attention they may have another N.
inline void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                      bool grouped = false, bool cross = false) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, op, ": q, k, v are (B, H, N, D)");
  const int64_t h = q.size(1), heads = grouped ? k.size(1) : h, n = (cross ? k : q).size(2);
  STD_TORCH_CHECK(heads == h || (heads > 0 && h % heads == 0), op,
                  ": k has the wrong shape: its heads divide those of q");
  check_shape(op, "k", k, {q.size(0), heads, n, q.size(3)});
  check_shape(op, "v", v, {q.size(0), heads, n, v.size(3)});
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
}

/// key_mask (B, N), where there is one.
inline void check_mask(const char* op, const std::optional<Tensor>& mask, int64_t b, int64_t n) {
  if (!mask) return;
  check_shape(op, "key_mask", *mask, {b, n});
  check_dtype(op, "key_mask", *mask, ScalarType::Bool);
}

/// The output o or its gradient (B, H, N, Dv), of the type of q.
inline void check_output(const char* op, const char* name, const Tensor& x, const Tensor& q,
                         int64_t dv) {
  check_shape(op, name, x, {q.size(0), q.size(1), q.size(2), dv});
  check_dtype(op, name, x, q.scalar_type());
}

/// One number a query (B, H, N), in the accumulation type: lse or its gradient.
inline void check_lse(const char* op, const char* name, const Tensor& x, const Tensor& q) {
  check_shape(op, name, x, {q.size(0), q.size(1), q.size(2)});
  check_dtype(op, name, x, accumulator(q));
}

// --- views and outputs ----------------------------------------------------------------------------

/// x itself when its last dimension has unit stride (what the kernels read), else one copy.
inline Tensor unit_last(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : torch::stable::contiguous(x);
}

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& x) {
  return x ? std::optional(torch::stable::contiguous(*x)) : std::nullopt;
}

inline const uint8_t* mask_bytes(const std::optional<Tensor>& mask) {
  return mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
}

/// A (B, H, N, D) output laid out in memory as (B, N, H, D): merging the heads then costs nothing.
inline Tensor token_major(const Tensor& like, int64_t b, int64_t h, int64_t n, int64_t d) {
  return torch::stable::transpose(empty(like, {b, n, h, d}), 1, 2);
}

/// Where the rows of a (B, H, N, D) tensor lie; strides count elements, the last one is 1.
struct Rows {
  void* data = nullptr;
  int64_t b = 0, h = 0, n = 0;

  Rows() = default;
  explicit Rows(const Tensor& x)
      : data(x.data_ptr()), b(x.stride(0)), h(x.stride(1)), n(x.stride(2)) {}
};

}  // namespace tab
