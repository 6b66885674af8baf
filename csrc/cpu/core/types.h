// Element types as the kernels see them, and the type that each accumulates in.
#pragma once

#include <cstdint>

#include "../../common.h"

namespace tab {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
struct accumulate {
  using type = float;
};
template <>
struct accumulate<double> {
  using type = double;
};
template <class T>
using acc_t = typename accumulate<T>::type;

/// f.template operator()<T>() with T the element type of x.
template <class F>
auto dispatch(const char* op, const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f.template operator()<float>();
    case ScalarType::BFloat16: return f.template operator()<bf16>();
    case ScalarType::Half: return f.template operator()<fp16>();
    case ScalarType::Double: return f.template operator()<double>();
    default: STD_TORCH_CHECK(false, op, ": float32, bfloat16, float16 or float64 tensors only");
  }
}

}  // namespace tab
