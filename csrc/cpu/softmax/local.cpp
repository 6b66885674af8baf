// tab::local_fwd and tab::local_bwd on the CPU.
//
//     o_i = Σ_{j∈W(i)} exp(s_ij - L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_{j∈W(i)} exp s_ij
//     line:  W(i) = {j : p_i - left ≤ j ≤ p_i + right},  p_i = i + N_k - N_q
//     grid:  W(i) = {j : -left ≤ row(j) - row(i) ≤ right, and the same for the columns}
//
// Beltagy et al. 2020, "Longformer", sec. 3.1; Ramachandran et al. 2019, eq. 2. The keys of a strip
// of queries are one run with closed-form ends (on a grid: whole rows); see softmax.h for the scheme.

#include "softmax.h"

namespace tab {

struct Local : Softmax {
  int64_t left, right, cols;  // cols 0: the tokens are a line

  void enter(int64_t /* sequence */) {}  // the window is the same for all
};

}  // namespace tab

#define TAB_KERNEL "../softmax/local_kernel.h"
#include "../core/each_isa.h"
#include "softmax_driver.h"

namespace tab {
namespace {

/// The window, once N is known.
void prepare(const char* op, Local& a, int64_t left, int64_t right, int64_t rows, int64_t cols,
             bool causal) {
  const int64_t most = std::max(a.n, a.m);
  STD_TORCH_CHECK(left >= 0 && right >= 0 && left <= most && right <= most, op,
                  ": 0 ≤ left, right ≤ N");
  STD_TORCH_CHECK(
      (rows == 0 && cols == 0) || (rows > 0 && cols > 0 && rows * cols == a.n && a.n == a.m), op,
      ": rows · cols = N, or both 0");
  STD_TORCH_CHECK(most < int64_t(1) << 30, op, ": N < 2^30");
  a.left = left, a.right = right, a.cols = cols, a.causal = causal;
}

/// Pieces that a strip's list of keys can have.
int64_t most_runs(const Local& a) { return a.m / 64 + 2; }

/// Of the keys that the queries i0 … i1 see.
std::pair<int64_t, int64_t> bounds(const Local& a, int64_t i0, int64_t i1) {
  const baseline::Window<float, false> line{a, 0, 0, 1, {}, {}, {}};
  const baseline::Window<float, true> grid{a, 0, 0, a.cols, {}, {}, {}};
  if (a.cols > 0) return {grid.from(i0), grid.to(i1 - 1)};
  return {line.from(i0), line.to(i1 - 1)};
}

using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Two forward(const char* op, Local& a, const Inputs& in, const Ends& ends) {
  return dispatch(op, in.q, [&]<class T>() {
    return softmax_forward<T>(a, TAB_SELECT(local_kernels<T>), most_runs, in, ends);
  });
}

Three backward(const char* op, Local& a, const Inputs& in, const Ends& ends) {
  return dispatch(op, in.q, [&]<class T>() {
    return softmax_backward<T>(a, TAB_SELECT(local_kernels<T>), most_runs, false, bounds, in, ends);
  });
}

// --- dense and packed -----------------------------------------------------------------------------

Two dense_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask,
                  std::optional<Tensor> slopes, int64_t left, int64_t right, int64_t rows,
                  int64_t cols, bool causal, double scale, double softcap) {
  constexpr const char* op = "local_fwd";
  Local a{};
  const Inputs in(op, a, q, k, v, key_mask, true, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  prepare(op, a, left, right, rows, cols, causal);
  return forward(op, a, in, {});
}

Two packed_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask,
                   std::optional<Tensor> slopes, Tensor cu_seqlens, int64_t left, int64_t right,
                   int64_t rows, int64_t cols, bool causal, double scale, double softcap) {
  constexpr const char* op = "local_packed_fwd";
  STD_TORCH_CHECK(rows == 0 && cols == 0, op, ": on a line only");
  Local a{};
  const Inputs in(op, a, q, k, v, key_mask, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  prepare(op, a, left, right, rows, cols, causal);
  return forward(op, a, in, Ends(op, cu_seqlens, a.b, a.n));
}

Three dense_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse,
                     std::optional<Tensor> key_mask, std::optional<Tensor> slopes, int64_t left,
                     int64_t right, int64_t rows, int64_t cols, bool causal, double scale,
                     double softcap) {
  constexpr const char* op = "local_bwd";
  Local a{};
  const Inputs in(op, a, q, k, v, key_mask, true, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  prepare(op, a, left, right, rows, cols, causal);
  const Cotangents given(op, a, grad, q, o, lse);
  return backward(op, a, in, {});
}

Three packed_backward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> key_mask,
                      std::optional<Tensor> slopes, Tensor o, Tensor lse,
                      std::optional<Tensor> grad, std::optional<Tensor> dlse, Tensor cu_seqlens,
                      int64_t left, int64_t right, int64_t rows, int64_t cols, bool causal,
                      double scale, double softcap) {
  constexpr const char* op = "local_packed_bwd";
  STD_TORCH_CHECK(rows == 0 && cols == 0, op, ": on a line only");
  Local a{};
  const Inputs in(op, a, q, k, v, key_mask, true);
  const Rules rules(op, a, in, slopes, scale, softcap);
  prepare(op, a, left, right, rows, cols, causal);
  const Cotangents given(op, a, or_zeros(grad, o), q, o, lse, dlse);
  return backward(op, a, in, Ends(op, cu_seqlens, a.b, a.n));
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("local_fwd", TORCH_BOX(&tab::dense_forward));
  m.impl("local_bwd", TORCH_BOX(&tab::dense_backward));
}
STABLE_TORCH_LIBRARY_IMPL(tab_packed, CPU, m) {
  m.impl("local_packed_fwd", TORCH_BOX(&tab::packed_forward));
  m.impl("local_packed_bwd", TORCH_BOX(&tab::packed_backward));
}
