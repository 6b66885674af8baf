// tab::linear_fwd and tab::linear_bwd on the CPU.
//
//     o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + ε),  S = Σ_j φ(k_j) v_jᵀ,  z = Σ_j φ(k_j);  causal: over j ≤ i
//     g_i = do_i/den_i, r_i = -g_i·o_i:  dφ(q_i) = S g_i + z r_i,  dS = Σ_i φ(q_i) g_iᵀ (i ≥ j),
//     dz = Σ_i φ(q_i) r_i,  dφ(k_j) = dS v_j + dz,  dv_j = dSᵀφ(k_j)
//
// Katharopoulos et al. 2020, eq. 4-5 and 9-12; the causal sums run over tiles, with the quadratic
// form inside a tile. φ is recomputed in the backward pass and never reaches memory.
//
// Work is cut into (b, h) and, when there are too few of those for the threads, into segments of
// the sequence: their states are summed first, then every segment runs on its own.
//
// The order φ(q)(φ(k)ᵀv) is taken at every N: S must be returned, so the quadratic order could
// win only below N = D/2.

#include "../common.h"

namespace tab {

struct Linear {
  int64_t b, h, n, d, e;           // e is Dv
  int64_t tile, segments, length;  // tokens in a tile; segments of a sequence, tokens in each
  int map;                         // φ: 0 elu + 1, 1 relu, 2 identity
  bool causal;
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

}  // namespace tab

#define TAB_KERNEL "linear_kernel.h"
#include "each_isa.h"

namespace tab {
namespace {

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
    clear(carry);
    add(carry, s, z, head);
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
int64_t scratch_size(const Linear& a, int64_t lanes) {
  using S = States<float>;
  const int64_t wide = S::up(a.d > a.e ? a.d : a.e, lanes), tile = S::up(a.tile, lanes);
  return 8 * Arena<float>::cost(tile * wide) + Arena<float>::cost(wide * wide) +
         Arena<float>::cost(tile * tile) + 4 * Arena<float>::cost(tile + wide);
}

Linear prepare(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
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
  return a;
}

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
      : s(torch::stable::new_empty(like, {a.b, a.h, a.d, a.e}, accumulator(like))),
        z(torch::stable::new_empty(like, {a.b, a.h, a.d}, accumulator(like))) {
    large_pages(*s);
    point();
  }
  void point() {
    sp = static_cast<A*>(s->data_ptr()), zp = static_cast<A*>(z->data_ptr());
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                           std::optional<Tensor> s0, std::optional<Tensor> z0,
                                           int64_t map, bool causal, double eps) {
  Linear a = prepare("linear_fwd", q, k, v, mask, s0, z0, map, causal, eps);
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  if (mask) mask = torch::stable::contiguous(*mask);
  Tensor o = token_major(v, a.b, a.h, a.n, a.e);
  a.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.o = Rows(o);

  return dispatch("linear_fwd", q, [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = acc_t<T>;
    const LinearKernels& kernels = TAB_SELECT(linear_kernels<T>);
    const Pair<A> first("linear_fwd", a, q, s0, z0), last(a, q);
    const States<A> states(a, kernels.lanes);
    const int64_t heads = a.b * a.h, work = scratch_size(a, kernels.lanes);
    const int64_t last_slot = causal ? a.segments - 1 : 0;

    if (a.segments == 1) {
      parallel(heads, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + 2 * Arena<A>::cost(states.size));
        A *state = scratch.take(states.size), *carry = scratch.take(states.size);
        states.clear(state);
        if (!causal) kernels.keys(a, head, state, scratch.next);
        states.scan(state, first.sp, first.zp, head, false, carry);
        kernels.outputs(a, head, state, scratch.next);
        states.copy_out(state, last.sp, last.zp, head);
      });
      return {o, *last.s, *last.z};
    }
    Tensor buffer = torch::stable::new_empty(q, {heads * a.segments * states.size}, accumulator(q));
    A* all = static_cast<A*>(buffer.data_ptr());
    parallel(heads * a.segments, [&](int64_t task) {
      states.clear(all + task * states.size);
      kernels.keys(a, task, all + task * states.size, arena<A>(work).next);
    });
    parallel(heads, [&](int64_t head) {
      states.scan(all + head * a.segments * states.size, first.sp, first.zp, head, false,
                  arena<A>(states.size).next);
    });
    parallel(heads * a.segments, [&](int64_t task) {
      const int64_t slot = causal ? task : task / a.segments * a.segments;
      kernels.outputs(a, task, all + slot * states.size, arena<A>(work).next);
    });
    for (int64_t head = 0; head < heads; ++head)
      states.copy_out(all + (head * a.segments + last_slot) * states.size, last.sp, last.zp, head);
    return {o, *last.s, *last.z};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor grad, std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor q, Tensor k, Tensor v,
    Tensor o, std::optional<Tensor> mask, std::optional<Tensor> s0, std::optional<Tensor> z0,
    int64_t map, bool causal, double eps) {
  Linear a = prepare("linear_bwd", q, k, v, mask, s0, z0, map, causal, eps);
  check_shape("linear_bwd", "do", grad, {a.b, a.h, a.n, a.e});
  check_shape("linear_bwd", "o", o, {a.b, a.h, a.n, a.e});
  check_dtype("linear_bwd", "do", grad, q.scalar_type());
  check_dtype("linear_bwd", "o", o, q.scalar_type());
  q = unit_last(q), k = unit_last(k), v = unit_last(v), o = unit_last(o), grad = unit_last(grad);
  if (mask) mask = torch::stable::contiguous(*mask);
  Tensor dq = token_major(q, a.b, a.h, a.n, a.d), dk = token_major(k, a.b, a.h, a.n, a.d);
  Tensor dv = token_major(v, a.b, a.h, a.n, a.e);
  a.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.o = Rows(o), a.grad = Rows(grad);
  a.dq = Rows(dq), a.dk = Rows(dk), a.dv = Rows(dv);
  std::optional<Tensor> notes;
  if (causal) {
    notes = torch::stable::new_empty(q, {a.b, a.h, 2, a.n}, accumulator(q));
    a.notes = notes->data_ptr();
  }
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  return dispatch("linear_bwd", q, [&]<class T>() -> Result {
    using A = acc_t<T>;
    const LinearKernels& kernels = TAB_SELECT(linear_kernels<T>);
    const Pair<A> first("linear_bwd", a, q, s0, z0), last("linear_bwd", a, q, ds, dz), out(a, q);
    const States<A> states(a, kernels.lanes);
    const int64_t heads = a.b * a.h, work = scratch_size(a, kernels.lanes), size = states.size;

    if (a.segments == 1) {
      parallel(heads, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + 3 * Arena<A>::cost(size));
        A *state = scratch.take(size), *dstate = scratch.take(size), *carry = scratch.take(size);
        states.clear(state);
        states.clear(dstate);
        if (!causal) kernels.keys(a, head, state, scratch.next);
        states.scan(state, first.sp, first.zp, head, false, carry);
        kernels.queries(a, head, state, causal ? nullptr : dstate, scratch.next);
        states.scan(dstate, last.sp, last.zp, head, true, carry);
        kernels.gradients(a, head, dstate, scratch.next);
        states.copy_out(dstate, out.sp, out.zp, head);
      });
      return {dq, dk, dv, *out.s, *out.z};
    }
    Tensor buffer = torch::stable::new_empty(q, {2, heads * a.segments * size}, accumulator(q));
    A *all = static_cast<A*>(buffer.data_ptr()), *dall = all + heads * a.segments * size;
    const auto slot = [&](int64_t task) {
      return (causal ? task : task / a.segments * a.segments) * size;
    };
    parallel(heads * a.segments, [&](int64_t task) {
      states.clear(all + task * size);
      states.clear(dall + task * size);
      kernels.keys(a, task, all + task * size, arena<A>(work).next);
    });
    parallel(heads, [&](int64_t head) {
      states.scan(all + head * a.segments * size, first.sp, first.zp, head, false,
                  arena<A>(size).next);
    });
    parallel(heads * a.segments, [&](int64_t task) {
      kernels.queries(a, task, all + slot(task), dall + task * size, arena<A>(work).next);
    });
    parallel(heads, [&](int64_t head) {
      states.scan(dall + head * a.segments * size, last.sp, last.zp, head, true,
                  arena<A>(size).next);
    });
    parallel(heads * a.segments, [&](int64_t task) {
      kernels.gradients(a, task, dall + slot(task), arena<A>(work).next);
    });
    for (int64_t head = 0; head < heads; ++head)
      states.copy_out(dall + head * a.segments * size, out.sp, out.zp, head);
    return {dq, dk, dv, *out.s, *out.z};
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&tab::forward));
  m.impl("linear_bwd", TORCH_BOX(&tab::backward));
}
