// What every kernel of TAB shares, CPU and CUDA: checks of arguments, strided views, outputs.
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

namespace tab {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

/// x itself when its last dimension has unit stride (what the kernels read), else one copy.
inline Tensor unit_last(const Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : torch::stable::contiguous(x);
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
