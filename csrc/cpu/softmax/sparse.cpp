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
  const struct Plan* plan;         // of a packed batch

  void enter(int64_t sequence);
};

/// The pattern of one sequence of a packed batch, whose n is known: its block size, patterns, where its
/// row_ptr and its col begin among those of all, and the length of the latter.
struct Plan {
  int64_t block, patterns, row_ptr, col, entries;
};

/// row_ptr and col of all patterns become those of one sequence.
inline void Sparse::enter(int64_t sequence) {
  const Plan& of = plan[sequence];
  row_ptr += of.row_ptr, col += of.col, patterns = of.patterns, block = of.block;
  blocks = ceiling(n, block), columns = ceiling(m, block);
}

}  // namespace tab

#define TAB_KERNEL "../softmax/sparse_kernel.h"
#include "../core/each_isa.h"
#include "softmax_driver.h"

namespace tab {
namespace {

/// Whether the rows of a pattern list blocks that there are, of `entries` numbers in col.
bool inside(const Sparse& a, int64_t entries) {
  for (int64_t p = 0; p < a.patterns; ++p)
    for (int64_t i = 0; i < a.blocks; ++i) {
      const int32_t* x = a.row_ptr + p * (a.blocks + 1) + i;
      if (x[0] < 0 || x[0] > x[1] || x[1] > entries) return false;
      for (int64_t at = x[0]; at < x[1]; ++at)
        if (a.col[at] < 0 || a.col[at] >= a.columns) return false;
    }
  return true;
}

/// The pattern, once N is known, checked down to each entry: the kernels follow it into memory.
struct Pattern {
  Tensor row_ptr, col;
  std::vector<Plan> plan;

  Pattern(const char* op, Sparse& a, const Tensor& row_ptr_, const Tensor& col_, bool causal)
      : row_ptr(torch::stable::contiguous(row_ptr_)), col(torch::stable::contiguous(col_)) {
    STD_TORCH_CHECK(std::max(a.n, a.m) < int64_t(1) << 30, op, ": N < 2^30");
    check_shape(op, "col", col, {col.numel()});
    check_dtype(op, "row_ptr", row_ptr, ScalarType::Int);
    check_dtype(op, "col", col, ScalarType::Int);
    a.row_ptr = static_cast<const int32_t*>(row_ptr.data_ptr());
    a.col = static_cast<const int32_t*>(col.data_ptr());
    a.causal = causal;
  }
  /// Of a dense batch.
  Pattern(const char* op, Sparse& a, const Tensor& row_ptr_, const Tensor& col_, bool causal,
          int64_t block)
      : Pattern(op, a, row_ptr_, col_, causal) {
    STD_TORCH_CHECK(block > 0, op, ": block_size > 0");
    a.block = block, a.blocks = ceiling(a.n, block), a.columns = ceiling(a.m, block);
    STD_TORCH_CHECK(row_ptr.dim() == 2 && (row_ptr.size(0) == 1 || row_ptr.size(0) == a.h), op,
                    ": row_ptr is (1 or H, nb + 1)");
    a.patterns = row_ptr.size(0);
    check_shape(op, "row_ptr", row_ptr, {a.patterns, a.blocks + 1});
    STD_TORCH_CHECK(inside(a, col.numel()), op, ": row_ptr and col point outside the pattern");
  }
  /// Of the sequences of a packed batch: one behind the other, where `plan_` (S, 5) says. Sequences
  /// of one length share a pattern.
  Pattern(const char* op, Sparse& a, const Tensor& row_ptr_, const Tensor& col_, bool causal,
          const Tensor& plan_, const Ends& ends)
      : Pattern(op, a, row_ptr_, col_, causal) {
    const Tensor rows = torch::stable::contiguous(plan_);
    check_shape(op, "row_ptr", row_ptr, {row_ptr.numel()});
    check_shape(op, "plan", rows, {ends.count(), 5});
    check_dtype(op, "plan", rows, ScalarType::Long);
    bool good = true;
    for (int64_t i = 0; good && i < ends.count(); ++i) {
      const int64_t* x = static_cast<const int64_t*>(rows.data_ptr()) + 5 * i;
      plan.push_back({x[0], x[1], x[2], x[3], x[4]});
      Sparse one = a;
      one.n = one.m = ends.at[i + 1] - ends.at[i], one.plan = plan.data();
      if (one.n == 0) continue;
      good = x[0] > 0 && x[0] < int64_t(1) << 31 && (x[1] == 1 || x[1] == a.h) && x[2] >= 0 &&
             x[3] >= 0 && x[4] >= 0 && x[3] <= col.numel() - x[4] &&
             x[2] <= row_ptr.numel() - x[1] * (ceiling(one.n, x[0]) + 1);
      if (!good) break;
      one.enter(i);
      good = inside(one, x[4]);
    }
    STD_TORCH_CHECK(good, op, ": plan, row_ptr and col point outside the patterns");
    a.plan = plan.data();
  }
};

/// Pieces that a strip's list of keys can have.
int64_t most_runs(const Sparse& a) { return a.columns + a.m / 64 + 2; }

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Two forward(const char* op, Sparse& a, const Inputs& in, const Ends& ends) {
  return dispatch(op, in.q, [&]<class T>() {
    return softmax_forward<T>(a, TAB_SELECT(sparse_kernels<T>), most_runs, in, ends);
  });
}

Three backward(const char* op, Sparse& a, const Inputs& in, const Ends& ends) {
  const auto all = [](const Sparse& a, int64_t, int64_t) -> std::pair<int64_t, int64_t> {
    return {0, a.m};
  };
  return dispatch(op, in.q, [&]<class T>() {
    return softmax_backward<T>(a, TAB_SELECT(sparse_kernels<T>), most_runs, true, all, in, ends);
  });
}

// --- dense and packed -----------------------------------------------------------------------------

Two dense_forward(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor, Tensor,
                  std::optional<Tensor> key_mask, std::optional<Tensor> slopes, int64_t block_size,
                  bool causal, double scale, double softcap) {
  constexpr const char* op = "sparse_fwd";
  Sparse a{};
  const Inputs in(op, a, q, k, v, key_mask, true, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  const Pattern pattern(op, a, row_ptr, col, causal, block_size);
  return forward(op, a, in, {});
}

Two packed_forward(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor, Tensor,
                   std::optional<Tensor> key_mask, std::optional<Tensor> slopes, Tensor plan,
                   Tensor cu_seqlens, bool causal, double scale, double softcap) {
  constexpr const char* op = "sparse_packed_fwd";
  Sparse a{};
  const Inputs in(op, a, q, k, v, key_mask, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  const Ends ends(op, cu_seqlens, a.b, a.n);
  const Pattern pattern(op, a, row_ptr, col, causal, plan, ends);
  return forward(op, a, in, ends);
}

Three dense_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,
                     Tensor row_ptr, Tensor col, Tensor, Tensor, std::optional<Tensor> key_mask,
                     std::optional<Tensor> slopes, int64_t block_size, bool causal, double scale,
                     double softcap) {
  constexpr const char* op = "sparse_bwd";
  Sparse a{};
  const Inputs in(op, a, q, k, v, key_mask, true, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  const Pattern pattern(op, a, row_ptr, col, causal, block_size);
  const Cotangents given(op, a, grad, q, o, lse);
  return backward(op, a, in, {});
}

Three packed_backward(Tensor q, Tensor k, Tensor v, Tensor row_ptr, Tensor col, Tensor, Tensor,
                      std::optional<Tensor> key_mask, std::optional<Tensor> slopes, Tensor plan,
                      Tensor o, Tensor lse, std::optional<Tensor> grad, std::optional<Tensor> dlse,
                      Tensor cu_seqlens, bool causal, double scale, double softcap) {
  constexpr const char* op = "sparse_packed_bwd";
  Sparse a{};
  const Inputs in(op, a, q, k, v, key_mask, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  const Ends ends(op, cu_seqlens, a.b, a.n);
  const Pattern pattern(op, a, row_ptr, col, causal, plan, ends);
  const Cotangents given(op, a, or_zeros(grad, o), q, o, lse, dlse);
  return backward(op, a, in, ends);
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("sparse_fwd", TORCH_BOX(&tab::dense_forward));
  m.impl("sparse_bwd", TORCH_BOX(&tab::dense_backward));
  m.impl("sparse_packed_fwd", TORCH_BOX(&tab::packed_forward));
  m.impl("sparse_packed_bwd", TORCH_BOX(&tab::packed_backward));
}
