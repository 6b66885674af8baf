// The host's side of the kernels for few tokens: arguments out of tensors, and the launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <optional>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "../../common.h"
#include "device.cuh"

namespace tab::few {

/// A problem computes what its block (one batch entry and head) has to, in `memory`. Its limits are
/// template arguments, so that tab/doctor/kernel_report.py can read them in the name.
template <typename Problem, int THREADS, int64_t MOST_SHARED_BYTES>
__global__ void __launch_bounds__(THREADS, Problem::BLOCKS) run(const Problem problem) {
  extern __shared__ __align__(16) unsigned char memory[];
  problem(memory);
}

template <typename Problem>
void launch(const char* op, const Problem& problem, int64_t bytes, const Tensor& q) {
  const int device = q.get_device_index();
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  STD_TORCH_CHECK(bytes <= most, op, " needs ", bytes, " bytes of shared memory, this GPU has ",
                  most, "; use backend=\"auto\" or \"triton\"");
  const auto kernel = run<Problem, Problem::THREADS, Problem::BYTES>;
  if (bytes > 48 * 1024)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(bytes)));
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto blocks = static_cast<unsigned>(q.size(0) * q.size(1));
  kernel<<<blocks, Problem::THREADS, bytes, static_cast<cudaStream_t>(stream)>>>(problem);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
Heads<T> heads(const Tensor& x) {
  return {static_cast<T*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

/// f(T{}) with T the element type of x
template <typename F>
void with_type(const char* op, const Tensor& x, F f) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(__half{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    default:
      STD_TORCH_CHECK(false, op, " (backend=\"cuda\") takes float32, bfloat16 and float16; ",
                      "use backend=\"auto\"");
  }
}

inline const float* floats(const std::optional<Tensor>& x) {
  return x ? static_cast<const float*>(x->data_ptr()) : nullptr;
}
inline Tensor states(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, sizes, ScalarType::Float);
}

/// What every kernel here refuses, before anything else is looked at
inline void check_few(const char* op, const Tensor& q) {
  const int64_t n = q.size(2);
  STD_TORCH_CHECK(n <= MAX_TOKENS, op, " (backend=\"cuda\") takes N ≤ ", MAX_TOKENS, "; got N ", n,
                  "; use backend=\"auto\" or \"triton\"");
  with_type(op, q, [](auto) {});
}
inline void check_floats(const char* op, const char* name, const Tensor& x,
                         std::initializer_list<int64_t> want) {
  check_shape(op, name, x, want);
  check_dtype(op, name, x, ScalarType::Float);
}

}  // namespace tab::few
