// tab_cuda::local_*, tab_cuda::sparse_*: N ≤ 64, one block a (batch, head), one launch. The
// arithmetic is in softmax.cuh; here are checks, launch, registration.
#include <optional>
#include <tuple>

#include "../core/launch.h"
#include "softmax_backward.cuh"

namespace tab::few {
namespace {

using Forwarded = std::tuple<Tensor, Tensor>;
using Backwarded = std::tuple<Tensor, Tensor, Tensor>;

Forwarded forward(const char* op, Tensor q, Tensor k, Tensor v, const Sees& sees, double scale) {
  check_qkv(op, q, k, v);
  check_few(op, q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  const int64_t b = q.size(0), h = q.size(1), n = q.size(2), d = q.size(3), dv = v.size(3);
  Tensor o = token_major(v, b, h, n, dv), lse = states(q, {b, h, n});
  with_type(op, q, [&](auto type) {
    using T = decltype(type);
    const SoftmaxForward<T> problem{static_cast<int>(h),
                                    static_cast<int>(d),
                                    static_cast<int>(dv),
                                    static_cast<float>(scale),
                                    sees,
                                    heads<const T>(q),
                                    heads<const T>(k),
                                    heads<const T>(v),
                                    heads<T>(o),
                                    static_cast<float*>(lse.data_ptr())};
    launch(op, problem, problem.BYTES, q);
  });
  return {o, lse};
}

Backwarded backward(const char* op, Tensor dout, Tensor q, Tensor k, Tensor v, const Tensor& lse,
                    const Sees& sees, double scale) {
  check_qkv(op, q, k, v);
  check_few(op, q);
  const int64_t b = q.size(0), h = q.size(1), n = q.size(2), d = q.size(3), dv = v.size(3);
  check_output(op, "do", dout, q, dv);
  check_lse(op, "lse", lse, q);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  dout = unit_last(dout), q = unit_last(q), k = unit_last(k), v = unit_last(v);
  const Tensor l = torch::stable::contiguous(lse);
  Tensor dq = token_major(q, b, h, n, d), dk = token_major(k, b, h, n, d);
  Tensor dv_out = token_major(v, b, h, n, dv);
  with_type(op, q, [&](auto type) {
    using T = decltype(type);
    const SoftmaxBackward<T> problem{static_cast<int>(h),
                                     static_cast<int>(d),
                                     static_cast<int>(dv),
                                     static_cast<float>(scale),
                                     sees,
                                     heads<const T>(dout),
                                     heads<const T>(q),
                                     heads<const T>(k),
                                     heads<const T>(v),
                                     static_cast<const float*>(l.data_ptr()),
                                     heads<T>(dq),
                                     heads<T>(dk),
                                     heads<T>(dv_out)};
    launch(op, problem, problem.BYTES, q);
  });
  return {dq, dk, dv_out};
}

// --- which keys ----------------------------------------------------------------------------------

using Mask = std::optional<Tensor>;

void check_plain(const char* op, const Mask& key_mask, const Mask& slopes, double softcap) {
  STD_TORCH_CHECK(!key_mask && !slopes && softcap == 0, op,
                  ": it takes no key_mask, no slopes and no softcap");
}

Sees window(const char* op, const Tensor& q, int64_t left, int64_t right, int64_t rows,
            int64_t cols, bool causal) {
  STD_TORCH_CHECK(q.dim() == 4, op, ": q has four dimensions");
  const int64_t n = q.size(2);
  check_few(op, q);
  STD_TORCH_CHECK(left >= 0 && right >= 0 && left <= n && right <= n, op,
                  ": left and right lie in 0 … N");
  STD_TORCH_CHECK(rows >= 0 && cols >= 0 && (cols == 0 || rows * cols == n), op,
                  ": rows · cols is N, or both are 0");
  Sees sees{};
  sees.n = static_cast<int>(n), sees.causal = causal;
  sees.left = static_cast<int>(left), sees.right = static_cast<int>(right);
  sees.rows = static_cast<int>(rows), sees.cols = static_cast<int>(cols);
  return sees;
}

Sees blocks(const char* op, const Tensor& q, const Tensor& row_ptr, const Tensor& col,
            int64_t block, bool causal) {
  STD_TORCH_CHECK(q.dim() == 4 && row_ptr.dim() == 2 && col.dim() == 1 && block > 0, op,
                  ": q, row_ptr and col have 4, 2 and 1 dimensions, block_size is positive");
  const int64_t n = q.size(2), h = q.size(1);
  check_few(op, q);
  const int64_t patterns = row_ptr.size(0);
  STD_TORCH_CHECK(patterns == 1 || patterns == h, op, ": row_ptr is for one head or for all");
  check_shape(op, "row_ptr", row_ptr, {patterns, ceiling(n, block) + 1});
  check_dtype(op, "row_ptr", row_ptr, ScalarType::Int);
  check_dtype(op, "col", col, ScalarType::Int);
  Sees sees{};
  sees.n = static_cast<int>(n), sees.causal = causal;
  sees.row_ptr = static_cast<const int*>(row_ptr.data_ptr());
  sees.col = static_cast<const int*>(col.data_ptr());
  sees.block = static_cast<int>(block < n ? block : n), sees.patterns = static_cast<int>(patterns);
  return sees;
}

// --- ops -----------------------------------------------------------------------------------------

Forwarded local_forward(Tensor q, Tensor k, Tensor v, Mask key_mask, Mask slopes, int64_t left,
                        int64_t right, int64_t rows, int64_t cols, bool causal, double scale,
                        double softcap) {
  const char* op = "tab_cuda::local_fwd";
  check_plain(op, key_mask, slopes, softcap);
  return forward(op, q, k, v, window(op, q, left, right, rows, cols, causal), scale);
}

Backwarded local_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor /* o */, Tensor lse,
                          Mask key_mask, Mask slopes, int64_t left, int64_t right, int64_t rows,
                          int64_t cols, bool causal, double scale, double softcap) {
  const char* op = "tab_cuda::local_bwd";
  check_plain(op, key_mask, slopes, softcap);
  return backward(op, dout, q, k, v, lse, window(op, q, left, right, rows, cols, causal), scale);
}

Forwarded sparse_forward(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col,
                         Tensor /* col_ptr */, Tensor /* row */, Mask key_mask, Mask slopes,
                         int64_t block_size, bool causal, double scale, double softcap) {
  const char* op = "tab_cuda::sparse_fwd";
  check_plain(op, key_mask, slopes, softcap);
  const Tensor rows = torch::stable::contiguous(row_ptr), cols = torch::stable::contiguous(col);
  return forward(op, q, k, v, blocks(op, q, rows, cols, block_size, causal), scale);
}

Backwarded sparse_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor /* o */, Tensor lse,
                           Tensor row_ptr, Tensor col, Tensor /* col_ptr */, Tensor /* row */,
                           Mask key_mask, Mask slopes, int64_t block_size, bool causal,
                           double scale, double softcap) {
  const char* op = "tab_cuda::sparse_bwd";
  check_plain(op, key_mask, slopes, softcap);
  const Tensor rows = torch::stable::contiguous(row_ptr), cols = torch::stable::contiguous(col);
  return backward(op, dout, q, k, v, lse, blocks(op, q, rows, cols, block_size, causal), scale);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tab_cuda, CUDA, m) {
  m.impl("local_fwd", TORCH_BOX(&local_forward));
  m.impl("local_bwd", TORCH_BOX(&local_backward));
  m.impl("sparse_fwd", TORCH_BOX(&sparse_forward));
  m.impl("sparse_bwd", TORCH_BOX(&sparse_backward));
}

}  // namespace tab::few
