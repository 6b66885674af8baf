// tab::sparse_fwd and tab::sparse_bwd on the CPU.
//
//     o_i = Σ_{j∈A(i)} exp(s_ij - L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈A(i)} exp s_ij
//     A(i) = {j : block ⌊j/b⌋ is listed for block ⌊i/b⌋ of this head}, causal: and j ≤ i + N_k - N_q
//
// Zaheer et al. 2020, "Big Bird", sec. 2 and appendix D. The keys of a strip of queries are those of
// all blocks that one of its block rows lists; see softmax.h for the scheme. A long (global) block row
// is several strips, so threads share it. The transposed pattern (col_ptr, row) is not needed.

#include "softmax.h"

namespace tab {

struct Sparse : Softmax {
  const int32_t *row_ptr, *col;
  int64_t patterns;                // 1: the heads share the rows, else H
  int64_t block, blocks, columns;  // blocks of queries, and of keys
};

}  // namespace tab

#define TAB_KERNEL "../softmax/sparse_kernel.h"
#include "../core/each_isa.h"
#include "softmax_driver.h"

namespace tab {
namespace {

/// The pattern, once N is known, checked down to each entry: the kernels follow it into memory.
struct Pattern {
  Tensor row_ptr, col;

  Pattern(const char* op, Sparse& a, const Tensor& row_ptr_, const Tensor& col_, int64_t block,
          bool causal)
      : row_ptr(torch::stable::contiguous(row_ptr_)), col(torch::stable::contiguous(col_)) {
    STD_TORCH_CHECK(block > 0 && std::max(a.n, a.m) < int64_t(1) << 30, op,
                    ": block_size > 0, N < 2^30");
    a.block = block, a.blocks = ceiling(a.n, block), a.columns = ceiling(a.m, block);
    a.causal = causal;
    STD_TORCH_CHECK(row_ptr.dim() == 2 && (row_ptr.size(0) == 1 || row_ptr.size(0) == a.h), op,
                    ": row_ptr is (1 or H, nb + 1)");
    a.patterns = row_ptr.size(0);
    check_shape(op, "row_ptr", row_ptr, {a.patterns, a.blocks + 1});
    check_shape(op, "col", col, {col.numel()});
    check_dtype(op, "row_ptr", row_ptr, ScalarType::Int);
    check_dtype(op, "col", col, ScalarType::Int);
    a.row_ptr = static_cast<const int32_t*>(row_ptr.data_ptr());
    a.col = static_cast<const int32_t*>(col.data_ptr());
    const int64_t entries = col.numel();
    bool inside = true;
    for (int64_t p = 0; p < a.patterns; ++p)
      for (int64_t i = 0; i < a.blocks; ++i) {
        const int32_t* x = a.row_ptr + p * (a.blocks + 1) + i;
        inside = inside && 0 <= x[0] && x[0] <= x[1] && x[1] <= entries;
      }
    for (int64_t i = 0; i < entries; ++i) inside = inside && 0 <= a.col[i] && a.col[i] < a.columns;
    STD_TORCH_CHECK(inside, op, ": row_ptr and col point outside the pattern");
  }
};

/// Pieces that a strip's list of keys can have.
int64_t most_runs(const Sparse& a) { return a.columns + a.m / 64 + 2; }

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor,
                                   Tensor, std::optional<Tensor> key_mask,
                                   std::optional<Tensor> slopes, int64_t block_size, bool causal,
                                   double scale, double softcap) {
  constexpr const char* op = "sparse_fwd";
  Sparse a{};
  const Inputs in(op, a, q, k, v, key_mask, true, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  const Pattern pattern(op, a, row_ptr, col, block_size, causal);
  return dispatch(op, in.q, [&]<class T>() {
    return softmax_forward<T>(a, TAB_SELECT(sparse_kernels<T>), most_runs, in);
  });
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o,
                                            Tensor lse, Tensor row_ptr, Tensor col, Tensor, Tensor,
                                            std::optional<Tensor> key_mask,
                                            std::optional<Tensor> slopes, int64_t block_size,
                                            bool causal, double scale, double softcap) {
  constexpr const char* op = "sparse_bwd";
  Sparse a{};
  const Inputs in(op, a, q, k, v, key_mask, true, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  const Pattern pattern(op, a, row_ptr, col, block_size, causal);
  const Cotangents given(op, a, grad, q, o, lse);
  const auto all = [](const Sparse& a, int64_t, int64_t) -> std::pair<int64_t, int64_t> {
    return {0, a.m};
  };
  return dispatch(op, in.q, [&]<class T>() {
    return softmax_backward<T>(a, TAB_SELECT(sparse_kernels<T>), most_runs, true, all, in);
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("sparse_fwd", TORCH_BOX(&tab::forward));
  m.impl("sparse_bwd", TORCH_BOX(&tab::backward));
}
