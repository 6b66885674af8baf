// What gated_linear's kernels are given, and the state S that passes between them (gated_linear.cpp).
#pragma once

#include "../core/segments.h"

namespace tab {

struct Gated : Segmented {
  double scale;
  Rows g;      // log decay (B, H_kv, N, 1), in the accumulation type
  Rows dg;     // its gradient
  void* kept;  // (B, H_kv, tiles, D, Ep): S before each tile, which `keys` leaves there unless null
  bool stream;  // outputs too large for the caches are written past them
};

struct GatedKernels {
  using Step = void (*)(const Gated&, int64_t task, void* state, void* scratch);
  int64_t lanes;
  Step keys, outputs, reads, gradients;
};

/// States as the kernels hold them, S (D, Ep) and behind it the decay of the tokens that were added
/// up, and their exchange with contiguous tensors (B, H_kv, D, Dv), null where there is none.
template <class A>
struct GatedStates {
  const Gated& a;
  int64_t ep, size;  // padded Dv; elements of one state

  GatedStates(const Gated& a, int64_t lanes)
      : a(a), ep(up(a.e, lanes)), size(up(a.d * ep + 1, 16)) {}

  void clear(A* x) const { std::fill(x, x + size, A(0)), x[a.d * ep] = 1; }
  void read(A* x, const A* t, int64_t head) const {
    clear(x);
    if (t == nullptr) return;
    for (int64_t i = 0; i < a.d; ++i) std::copy_n(t + (head * a.d + i) * a.e, a.e, x + i * ep);
  }
  void write(const A* x, A* t, int64_t head) const {
    if (t == nullptr) return;
    for (int64_t i = 0; i < a.d; ++i) std::copy_n(x + i * ep, a.e, t + (head * a.d + i) * a.e);
  }
  void advance(A* carry, A* x) const {
    const A decay = x[a.d * ep];
    for (int64_t i = 0; i < a.d * ep; ++i) {
      const A own = x[i];
      x[i] = carry[i];
      carry[i] = decay * carry[i] + own;
    }
  }
};

/// Scratch of the kernels, in elements; every piece they take, and a little more.
inline int64_t scratch_size(const Gated& a, int64_t lanes) {
  const auto cost = [](int64_t n) { return Arena<float>::cost(n); };
  const int64_t wide = up(a.d > a.e ? a.d : a.e, lanes), tile = up(a.tile, lanes);
  return 8 * cost(tile * wide) + 4 * cost(wide * wide) + 2 * cost(tile * tile) + 8 * cost(tile);
}

}  // namespace tab
