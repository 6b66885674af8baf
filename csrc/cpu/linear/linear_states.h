// The states (S, z) that pass between linear's kernels, and their exchange with tensors (linear.cpp).
// Included after each_isa.h, whose rows go past the caches.
#pragma once

#include "linear.h"

namespace tab {

/// A contiguous (B, H, D, Dv), (B, H, D) pair of states as pointers, null where there is none.
template <class A>
struct Pair {
  std::optional<Tensor> s, z;
  A *sp = nullptr, *zp = nullptr;

  Pair(const char* op, const Linear& a, const Tensor& like, const std::optional<Tensor>& s0,
       const std::optional<Tensor>& z0) {
    STD_TORCH_CHECK(s0.has_value() == z0.has_value(), op, ": S and z come together");
    if (!s0) return;
    check_shape(op, "S", *s0, {a.states, a.h, a.d, a.e});
    check_shape(op, "z", *z0, {a.states, a.h, a.d});
    check_dtype(op, "S", *s0, accumulator(like));
    check_dtype(op, "z", *z0, accumulator(like));
    s = contiguous(s0), z = contiguous(z0);
    point();
  }
  /// Fresh ones, if anybody asks for them.
  Pair(const Linear& a, const Tensor& like, bool wanted) {
    if (!wanted) return;
    s = empty(like, {a.states, a.h, a.d, a.e}, accumulator(like));
    z = torch::stable::new_empty(like, {a.states, a.h, a.d}, accumulator(like));
    point();
  }
  void point() { sp = static_cast<A*>(s->data_ptr()), zp = static_cast<A*>(z->data_ptr()); }
};

/// States as the kernels hold them, S (D, Ep) and z (Dp), and their exchange with tensors.
template <class A>
struct LinearStates {
  const Linear& a;
  int64_t ep, size;  // padded Dv; elements of one state

  LinearStates(const Linear& a, int64_t lanes)
      : a(a), ep(up(a.e, lanes)), size(up(a.d * ep + up(a.d, lanes), 16)) {}

  void clear(A* x) const { std::fill(x, x + size, A(0)); }
  /// x = the state of this head, or an empty one.
  void read(A* x, const Pair<A>& t, int64_t head) const {
    if (t.sp == nullptr || ep != a.e || a.d % 16 != 0) clear(x);
    if (t.sp == nullptr) return;
    for (int64_t i = 0; i < a.d; ++i) std::copy_n(t.sp + (head * a.d + i) * a.e, a.e, x + i * ep);
    std::copy_n(t.zp + head * a.d, a.d, x + a.d * ep);
  }
  void write(const A* x, const Pair<A>& t, int64_t head) const {
    if (t.sp == nullptr) return;
    const bool past = large(*t.s);  // the caches: where N is D, the states are as large as o
    for (int64_t i = 0; i < a.d; ++i, x += ep) {
      A* row = t.sp + (head * a.d + i) * a.e;
      if (past)
        baseline::write_row(row, a.e, x, A(1), true);
      else
        std::copy_n(x, a.e, row);
    }
    std::copy_n(x, a.d, t.zp + head * a.d);
    if (past) baseline::fence();
  }
  void advance(A* carry, A* x) const {
    for (int64_t i = 0; i < size; ++i) {
      const A own = x[i];
      x[i] = carry[i];
      carry[i] += own;
    }
  }
};

/// Scratch of the kernels, in elements; every piece they take, and a little more.
inline int64_t scratch_size(const Linear& a, int64_t lanes) {
  const auto cost = [](int64_t n) { return Arena<float>::cost(n); };
  const int64_t wide = up(a.d > a.e ? a.d : a.e, lanes), tile = up(a.tile, lanes);
  return 8 * cost(tile * wide) + 3 * cost(wide * wide) + cost(tile * tile) + 6 * cost(tile + wide);
}

}  // namespace tab
