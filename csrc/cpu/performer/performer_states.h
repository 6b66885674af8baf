// The states (S, z, c) that pass between performer's kernels, and their exchange with tensors
// (performer.cpp). Included after each_isa.h, whose rows go past the caches.
#pragma once

#include <cmath>
#include <limits>

#include "performer.h"

namespace tab {

/// (B, H, M, Dv), (B, H, M) and (B, H, M) tensors as pointers, null where there is none.
template <class A>
struct Triple {
  std::optional<Tensor> s, z, c;
  A *sp = nullptr, *zp = nullptr, *cp = nullptr;

  Triple(const char* op, const Performer& a, const Tensor& like, const std::optional<Tensor>& s0,
         const std::optional<Tensor>& z0, const std::optional<Tensor>& c0) {
    STD_TORCH_CHECK(s0.has_value() == z0.has_value(), op, ": S and z come together");
    if (s0) sp = take(op, "S", *s0, {a.states, a.h, a.m, a.e}, like, s);
    if (z0) zp = take(op, "z", *z0, {a.states, a.h, a.m}, like, z);
    if (c0) cp = take(op, "c", *c0, {a.states, a.h, a.m}, like, c);
  }
  /// Fresh ones, contiguous, if anybody asks for them.
  Triple(const Performer& a, const Tensor& like, bool wanted) {
    if (!wanted) return;
    s = empty(like, {a.states, a.h, a.m, a.e}, accumulator(like));
    z = torch::stable::new_empty(like, {a.states, a.h, a.m}, accumulator(like));
    c = torch::stable::new_empty(like, {a.states, a.h, a.m}, accumulator(like));
    sp = data(*s), zp = data(*z), cp = data(*c);
  }
  static A* data(const Tensor& x) { return static_cast<A*>(x.data_ptr()); }
  static A* take(const char* op, const char* name, const Tensor& x,
                 std::initializer_list<int64_t> shape, const Tensor& like,
                 std::optional<Tensor>& kept) {
    check_shape(op, name, x, shape);
    check_dtype(op, name, x, accumulator(like));
    kept = torch::stable::contiguous(x);
    return data(*kept);
  }
};

/// States as the kernels hold them: S (Mp, Ep), z (Mp), c (Mp), and their exchange with tensors.
template <class A>
struct PerformerStates {
  const Performer& a;
  int64_t mp, ep, size;
  static constexpr A INF = std::numeric_limits<A>::infinity();

  PerformerStates(const Performer& a, int64_t lanes)
      : a(a), mp(up(a.m, 2 * lanes)), ep(up(a.e, lanes)), size(up(mp * ep + 2 * mp, 16)) {}

  A* z(A* x) const { return x + mp * ep; }
  A* c(A* x) const { return x + mp * ep + mp; }
  void clear(A* x) const {
    std::fill(x, c(x), A(0));
    std::fill(c(x), c(x) + mp, a.kernel == 0 ? -INF : A(0));
  }
  /// x = the state of one head, or an empty one. `sign` is -1 for gradients of the last state.
  void read(A* x, const Triple<A>& t, int64_t head, A sign = 1) const {
    clear(x);
    if (t.sp == nullptr) return;
    for (int64_t m = 0; m < a.m; ++m) {
      std::copy_n(t.sp + (head * a.m + m) * a.e, a.e, x + m * ep);
      z(x)[m] = t.zp[head * a.m + m];
      if (a.kernel == 1 && sign > 0) c(x)[m] = t.cp[head * a.m + m];
      if (a.kernel == 0)
        c(x)[m] = t.cp[head * a.m + m] == -INF ? -INF : sign * t.cp[head * a.m + m];
    }
  }
  void write(A* x, const Triple<A>& t, int64_t head) const {
    if (t.sp == nullptr) return;
    const bool past = large(*t.s);  // the caches: with M features it is as large as M tokens of v
    for (int64_t m = 0; m < a.m; ++m)
      baseline::write_row(t.sp + (head * a.m + m) * a.e, a.e, x + m * ep, A(1), past);
    std::copy_n(z(x), a.m, t.zp + head * a.m);
    std::copy_n(c(x), a.m, t.cp + head * a.m);
    if (past) baseline::fence();
  }
  /// carry = carry + x, at the larger of their shifts, and x = what carry was.
  void advance(A* carry, A* x) const {
    for (int64_t m = 0; m < mp; ++m) {
      A before = 1, own = 1;  // factors
      if (a.kernel == 0) {
        const A top = std::max(c(carry)[m], c(x)[m]), at = top == -INF ? A(0) : top;
        before = std::exp(c(carry)[m] - at), own = std::exp(c(x)[m] - at);
        c(x)[m] = c(carry)[m], c(carry)[m] = top;
      }
      const auto add = [&](int64_t i) {
        const A sum = carry[i] * before + x[i] * own;
        x[i] = carry[i], carry[i] = sum;
      };
      for (int64_t i = m * ep; i < (m + 1) * ep; ++i) add(i);
      add(mp * ep + m);
    }
  }
};

/// Scratch of the kernels, in elements; every piece they take, and a little more.
inline int64_t scratch_size(const Performer& a, int64_t lanes) {
  const auto cost = [](int64_t n) { return Arena<float>::cost(n); };
  const int64_t dp = up(a.d, lanes), ep = up(a.e, lanes), mp = up(a.m, 2 * lanes);
  const int64_t tp = up(a.tile, lanes), panel = 2 * lanes, all = a.causal ? a.group * tp : tp;
  return 3 * cost(all * dp) + 3 * cost(all * ep) + 2 * cost(all * mp) + 3 * cost(tp * panel) +
         cost(mp * a.e) + cost(tp * a.e) + 2 * cost(all * tp) + 2 * cost(all * lanes) +
         6 * cost(all) + cost(ep) + (a.compensated ? cost(mp * (ep + 1)) : 0);
}

}  // namespace tab
