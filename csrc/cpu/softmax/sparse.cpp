// tab::sparse_fwd and tab::sparse_bwd on the CPU.
//
//     o_i = Σ_{j∈A(i)} exp(s_ij - L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈A(i)} exp s_ij
//     A(i) = {j : block ⌊j/b⌋ is listed for block ⌊i/b⌋ of this head}, causal: and j ≤ i
//
// Zaheer et al. 2020, "Big Bird", sec. 2 and appendix D. The keys of a strip of queries are those of
// all blocks that one of its block rows lists; see strip.h for the scheme. A long (global) block row
// is several strips, so threads share it. The transposed pattern (col_ptr, row) is not needed.

#include "../../common.h"
#include "strip.h"

namespace tab {

struct Sparse : Strip {
  const int32_t *row_ptr, *col;
  int64_t patterns;  // 1: the heads share the rows, else H
  int64_t block, blocks;
  bool causal;
};

}  // namespace tab

#define TAB_KERNEL "../softmax/sparse_kernel.h"
#include "../core/each_isa.h"
#include "strip_driver.h"

namespace tab {
namespace {

/// The pattern, checked down to each entry: the kernels follow it into memory.
Sparse sparse(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& row_ptr, const Tensor& col, int64_t block_size, bool causal,
              double scale) {
  check_heads(op, q, k, v);
  const int64_t h = q.size(1), n = q.size(2);
  STD_TORCH_CHECK(block_size > 0 && n < int64_t(1) << 30, op, ": block_size > 0, N < 2^30");
  Sparse a{};
  a.block = block_size, a.blocks = (n + block_size - 1) / block_size;
  STD_TORCH_CHECK(row_ptr.dim() == 2 && (row_ptr.size(0) == 1 || row_ptr.size(0) == h), op,
                  ": row_ptr is (1 or H, nb + 1)");
  a.patterns = row_ptr.size(0);
  check_shape(op, "row_ptr", row_ptr, {a.patterns, a.blocks + 1});
  check_shape(op, "col", col, {col.numel()});
  check_dtype(op, "row_ptr", row_ptr, ScalarType::Int);
  check_dtype(op, "col", col, ScalarType::Int);
  a.row_ptr = static_cast<const int32_t*>(row_ptr.data_ptr());
  a.col = static_cast<const int32_t*>(col.data_ptr());
  bool inside = true;
  for (int64_t p = 0; p < a.patterns; ++p)
    for (int64_t i = 0; i < a.blocks; ++i) {
      const int32_t* x = a.row_ptr + p * (a.blocks + 1) + i;
      inside = inside && 0 <= x[0] && x[0] <= x[1] && x[1] <= col.numel();
    }
  for (int64_t i = 0; i < col.numel(); ++i) inside = inside && 0 <= a.col[i] && a.col[i] < a.blocks;
  STD_TORCH_CHECK(inside, op, ": row_ptr and col point outside the pattern");
  a.causal = causal, a.scale = scale;
  return a;
}

/// Pieces that a strip's list of keys can have.
int64_t most_runs(const Sparse& a, const Tensor& q) { return a.blocks + q.size(2) / 64 + 2; }

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col,
                                   Tensor, Tensor, int64_t block_size, bool causal, double scale) {
  row_ptr = torch::stable::contiguous(row_ptr), col = torch::stable::contiguous(col);
  Sparse a = sparse("sparse_fwd", q, k, v, row_ptr, col, block_size, causal, scale);
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  return dispatch("sparse_fwd", q, [&]<class T>() {
    return strips_forward<T>(a, TAB_SELECT(sparse_kernels<T>), most_runs(a, q), q, k, v);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o,
                                            Tensor lse, Tensor row_ptr, Tensor col, Tensor, Tensor,
                                            int64_t block_size, bool causal, double scale) {
  row_ptr = torch::stable::contiguous(row_ptr), col = torch::stable::contiguous(col);
  Sparse a = sparse("sparse_bwd", q, k, v, row_ptr, col, block_size, causal, scale);
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  const BackwardInputs in("sparse_bwd", a, grad, q, v, o, lse);
  const auto all = [&](int64_t, int64_t) { return std::pair<int64_t, int64_t>(0, a.n); };
  return dispatch("sparse_bwd", q, [&]<class T>() {
    return strips_backward<T>(a, TAB_SELECT(sparse_kernels<T>), most_runs(a, q), true, all, q, k,
                              v);
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("sparse_fwd", TORCH_BOX(&tab::forward));
  m.impl("sparse_bwd", TORCH_BOX(&tab::backward));
}
