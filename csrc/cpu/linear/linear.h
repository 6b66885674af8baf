// What linear's kernels are given, and the states (S, z) that pass between them (linear.cpp).
#pragma once

#include <algorithm>

#include "../core/task.h"

namespace tab {

struct Linear {
  int64_t b, h, n, d, e;           // e is Dv
  int64_t tile, segments, length;  // tokens in a tile; segments of a sequence, tokens in each
  int map;                         // φ: 0 elu + 1, 1 relu, 2 identity
  bool causal, stream;             // stream: outputs too large for the caches are written past them
  bool compensated;                // sums of segments this long keep what additions round away
  double eps;
  const uint8_t* mask;  // (B, N) or null
  Rows q, k, v, o, grad, dq, dk, dv;
  void* notes;  // (B, H, 2, N): 1/den and r, causal backward only
};

struct LinearKernels {
  int64_t lanes;
  void (*keys)(const Linear&, int64_t task, void* state, void* scratch);
  void (*outputs)(const Linear&, int64_t task, void* state, void* scratch);
  void (*queries)(const Linear&, int64_t task, void* state, void* dstate, void* scratch);
  void (*gradients)(const Linear&, int64_t task, void* dstate, void* scratch);
};

/// The states of all segments, or of the one sequence a thread works on, and their exchange with
/// the (B, H, D, Dv) and (B, H, D) tensors.
template <class A>
struct States {
  const Linear& a;
  int64_t ep, size;  // padded Dv; elements of one state

  States(const Linear& a, int64_t lanes) : a(a), ep(up(a.e, lanes)) {
    size = up(a.d * ep + up(a.d, lanes), 16);
  }
  static int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

  void clear(A* x) const { std::fill(x, x + size, A(0)); }
  /// x = (s, z) of this head, or 0.
  void set(A* x, const A* s, const A* z, int64_t head) const {
    if (s == nullptr || ep != a.e || a.d % 16 != 0) clear(x);
    if (s == nullptr) return;
    for (int64_t i = 0; i < a.d; ++i) std::copy_n(s + (head * a.d + i) * a.e, a.e, x + i * ep);
    std::copy_n(z + head * a.d, a.d, x + a.d * ep);
  }
  void add(A* x, const A* y) const {
    for (int64_t i = 0; i < size; ++i) x[i] += y[i];
  }
  void add(A* x, const A* s, const A* z, int64_t head) const {
    if (s == nullptr) return;
    for (int64_t i = 0; i < a.d; ++i) {
      for (int64_t j = 0; j < a.e; ++j) x[i * ep + j] += s[(head * a.d + i) * a.e + j];
      x[a.d * ep + i] += z[head * a.d + i];
    }
  }
  void copy_out(const A* x, A* s, A* z, int64_t head) const {
    for (int64_t i = 0; i < a.d; ++i)
      std::copy_n(x + i * ep, a.e, s + (head * a.d + i) * a.e);
    std::copy_n(x + a.d * ep, a.d, z + head * a.d);
  }
  /// Sums of segments -> what each has to start from: causal, the sum of those before it (behind
  /// it in the `reverse`), plus `first`; else slot 0 becomes the total.
  void scan(A* states, const A* s, const A* z, int64_t head, bool reverse, A* carry) const {
    if (!a.causal) {
      for (int64_t i = 1; i < a.segments; ++i) add(states, states + i * size);
      add(states, s, z, head);
      return;
    }
    set(carry, s, z, head);
    for (int64_t i = 0; i < a.segments; ++i) {
      A* x = states + (reverse ? a.segments - 1 - i : i) * size;
      for (int64_t j = 0; j < size; ++j) {
        const A sum = x[j];
        x[j] = carry[j];
        carry[j] += sum;
      }
    }
  }
};

/// Scratch of the kernels, in elements; every piece they take, and a little more.
inline int64_t scratch_size(const Linear& a, int64_t lanes) {
  using S = States<float>;
  const int64_t wide = S::up(a.d > a.e ? a.d : a.e, lanes), tile = S::up(a.tile, lanes);
  return 8 * Arena<float>::cost(tile * wide) + 3 * Arena<float>::cost(wide * wide) +
         Arena<float>::cost(tile * tile) + 6 * Arena<float>::cost(tile + wide);
}

inline Linear prepare(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
               const std::optional<Tensor>& mask, const std::optional<Tensor>& s0,
               const std::optional<Tensor>& z0, int64_t map, bool causal, double eps) {
  Linear a{};
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, op, ": q, k, v are (B, H, N, D)");
  STD_TORCH_CHECK(map >= 0 && map <= 2, op, ": feature_map is 0, 1 or 2");
  a.b = q.size(0), a.h = q.size(1), a.n = q.size(2), a.d = q.size(3), a.e = v.size(3);
  check_shape(op, "k", k, {a.b, a.h, a.n, a.d});
  check_shape(op, "v", v, {a.b, a.h, a.n, a.e});
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  if (mask) {
    check_shape(op, "key_mask", *mask, {a.b, a.n});
    check_dtype(op, "key_mask", *mask, ScalarType::Bool);
  }
  STD_TORCH_CHECK(s0.has_value() == z0.has_value(), op, ": s0 and z0 come together");
  a.map = static_cast<int>(map), a.causal = causal, a.eps = eps;
  a.tile = a.d > 128 || a.e > 128 ? 32 : 64;
  const int64_t tiles = (a.n + a.tile - 1) / a.tile;
  const int64_t wanted = segments(a.b * a.h, tiles);
  a.length = (tiles + wanted - 1) / wanted * a.tile;
  a.segments = (a.n + a.length - 1) / a.length;
  a.compensated = a.length > LONG;
  return a;
}

/// Whether a tensor is so large that little of it is still cached when somebody reads it.
inline bool large(const Tensor& x) { return x.numel() >= int64_t{1} << 21; }

/// A contiguous (B, H, D, Dv), (B, H, D) pair of states as pointers, null where there is none.
template <class A>
struct Pair {
  std::optional<Tensor> s, z;
  A *sp = nullptr, *zp = nullptr;

  Pair(const char* op, const Linear& a, const Tensor& like, const std::optional<Tensor>& s0,
       const std::optional<Tensor>& z0) {
    STD_TORCH_CHECK(s0.has_value() == z0.has_value(), op, ": both parts of a state or none");
    if (!s0) return;
    check_shape(op, "S", *s0, {a.b, a.h, a.d, a.e});
    check_shape(op, "z", *z0, {a.b, a.h, a.d});
    check_dtype(op, "S", *s0, accumulator(like));
    check_dtype(op, "z", *z0, accumulator(like));
    s = torch::stable::contiguous(*s0), z = torch::stable::contiguous(*z0);
    point();
  }
  Pair(const Linear& a, const Tensor& like)
      : s(empty(like, {a.b, a.h, a.d, a.e}, accumulator(like))),
        z(torch::stable::new_empty(like, {a.b, a.h, a.d}, accumulator(like))) {
    point();
  }
  void point() {
    sp = static_cast<A*>(s->data_ptr()), zp = static_cast<A*>(z->data_ptr());
  }
};

}  // namespace tab
