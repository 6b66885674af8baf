// tab::performer_fwd and tab::performer_bwd on the CPU: FAVOR+ attention, Choromanski et al. 2021.
//
//     a_jm = w_m·k̂_j - ‖k̂_j‖²/2,  b_im = w_m·q̂_i,  x̂ = x·D^(-1/4);  "relu": a = w_m·k̂_j
//     c_m = max_j a_jm,  φ(k_j) = e^(a_j - c),  S = Σ_j φ(k_j) v_jᵀ,  z = Σ_j φ(k_j)
//     r_i = max_m (b_im + c_m),  φ(q_i) = e^(b_i + c - r_i)
//     o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + ε),  lse_i = r_i + log(φ(q_i)ᵀz + ε);  causal: over j ≤ i
//
// Backward, with φ(q_i) = e^(b_i + c - lse_i) made again and r_i = -do_i·o_i:
//
//     db_i = (S do_i + z r_i)∘φ(q_i),  dS = Σ_i φ(q_i) do_iᵀ (i ≥ j),  dz = Σ_i φ(q_i) r_i
//     da_j = (dS v_j + dz)∘φ(k_j),  dv_j = dSᵀφ(k_j),  dq̂ = db W,  dk̂ = da W - (Σ_m da_m) k̂
//
// c is found in one pass: a tile that raises a feature's maximum rescales that row of S and z. A
// row is raised log N times in N tokens, a second pass over the keys would cost 2·D·M FLOPs a
// token. Shifts: tab/ops/performer.py.
//
// Work is cut into (b, h) and, when there are too few of those for the threads, into segments of
// the sequence: their states are summed first, then every segment runs on its own.

#include <algorithm>
#include <cmath>
#include <limits>

#include "../../common.h"

namespace tab {

struct Performer {
  int64_t b, h, n, d, e, m;        // e is Dv
  int64_t tile, segments, length;  // tokens in a tile; segments of a sequence, tokens in each
  int kernel;                      // 0 softmax, 1 relu
  bool causal, compensated;  // compensated: sums of long segments keep what additions round away
  double eps, scale, root;   // scale D^(-1/2) and its root
  const uint8_t* mask;      // (B, N) or null
  Rows q, k, v, o, grad, dq, dk, dv;
  void *panels, *rows;  // W·D^(-1/4), packed
  void* lse;            // (B, H, N)
};

struct PerformerKernels {
  using Step = void (*)(const Performer&, int64_t task, void* state, void* scratch);
  int64_t lanes;
  void (*pack)(const Performer&, const void* projection);
  Step keys, outputs;
  void (*queries)(const Performer&, int64_t task, void* state, void* dstate, void* scratch);
  Step gradients, causal_outputs, reads, causal_queries, causal_gradients;
};

}  // namespace tab

#define TAB_KERNEL "../performer/performer_kernel.h"
#include "../core/each_isa.h"

namespace tab {
namespace {

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

/// (B, H, M, Dv), (B, H, M) and (B, H, M) tensors as pointers, null where there is none.
template <class A>
struct Tensors {
  std::optional<Tensor> s, z, c;
  A *sp = nullptr, *zp = nullptr, *cp = nullptr;

  Tensors(const char* op, const Performer& a, const Tensor& like, const std::optional<Tensor>& s0,
          const std::optional<Tensor>& z0, const std::optional<Tensor>& c0) {
    STD_TORCH_CHECK(s0.has_value() == z0.has_value(), op, ": both parts of a state or none");
    if (s0) sp = take(op, "S", *s0, {a.b, a.h, a.m, a.e}, like, s);
    if (z0) zp = take(op, "z", *z0, {a.b, a.h, a.m}, like, z);
    if (c0) cp = take(op, "c", *c0, {a.b, a.h, a.m}, like, c);
  }
  /// Fresh ones, contiguous.
  Tensors(const Performer& a, const Tensor& like)
      : s(empty(like, {a.b, a.h, a.m, a.e}, accumulator(like))),
        z(torch::stable::new_empty(like, {a.b, a.h, a.m}, accumulator(like))),
        c(torch::stable::new_empty(like, {a.b, a.h, a.m}, accumulator(like))) {
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
struct States {
  const Performer& a;
  int64_t mp, ep, size;
  static constexpr A INF = std::numeric_limits<A>::infinity();

  States(const Performer& a, int64_t lanes)
      : a(a), mp(up(a.m, 2 * lanes)), ep(up(a.e, lanes)), size(up(mp * ep + 2 * mp, 16)) {}

  A* z(A* x) const { return x + mp * ep; }
  A* c(A* x) const { return x + mp * ep + mp; }
  void clear(A* x) const {
    std::fill(x, c(x), A(0));
    std::fill(c(x), c(x) + mp, a.kernel == 0 ? -INF : A(0));
  }
  /// x = the state of one head, or an empty one. `sign` is -1 for gradients of the last state.
  void read(A* x, const Tensors<A>& t, int64_t head, A sign = 1) const {
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
  void write(A* x, const Tensors<A>& t, int64_t head) const {
    for (int64_t m = 0; m < a.m; ++m)
      std::copy_n(x + m * ep, a.e, t.sp + (head * a.m + m) * a.e);
    std::copy_n(z(x), a.m, t.zp + head * a.m);
    std::copy_n(c(x), a.m, t.cp + head * a.m);
  }
  /// x += y, at the larger of their shifts.
  void add(A* x, A* y) const {
    for (int64_t m = 0; m < mp; ++m) {
      A fx = 1, fy = 1;
      if (a.kernel == 0) {
        const A top = std::max(c(x)[m], c(y)[m]), at = top == -INF ? A(0) : top;
        fx = std::exp(c(x)[m] - at), fy = std::exp(c(y)[m] - at), c(x)[m] = top;
      }
      for (int64_t i = m * ep; i < (m + 1) * ep; ++i) x[i] = x[i] * fx + y[i] * fy;
      z(x)[m] = z(x)[m] * fx + z(y)[m] * fy;
    }
  }
  /// Sums of segments -> what each starts from: causal, `carry` and the sum of those before it
  /// (behind it in the `reverse`), else `carry` and all of them, in slot 0. `carry` ends as all.
  void scan(A* states, A* carry, bool reverse) const {
    std::unique_ptr<A[]> next(new A[size]);
    for (int64_t i = 0; i < a.segments; ++i) {
      A* x = states + (reverse ? a.segments - 1 - i : i) * size;
      std::copy_n(carry, size, next.get());
      add(carry, x);
      if (a.causal) std::copy_n(next.get(), size, x);
    }
    if (!a.causal) std::copy_n(carry, size, states);
  }
};

/// Scratch of the kernels, in elements; every piece they take, and a little more.
int64_t scratch_size(const Performer& a, int64_t lanes) {
  const auto cost = [](int64_t n) { return Arena<float>::cost(n); };
  const int64_t dp = up(a.d, lanes), ep = up(a.e, lanes), mp = up(a.m, 2 * lanes);
  const int64_t tp = up(a.tile, lanes), panel = 2 * lanes;
  return 3 * cost(tp * dp) + 3 * cost(tp * ep) + 2 * cost(tp * mp) + 3 * cost(tp * panel) +
         cost(mp * a.e) + cost(tp * a.e) + 2 * cost(tp * tp) + 2 * cost(tp * lanes) +
         6 * cost(tp) + cost(ep) + (a.compensated ? cost(mp * (ep + 1)) : 0);
}

Performer prepare(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                  const Tensor& projection, const std::optional<Tensor>& mask, int64_t kernel,
                  bool causal, double eps) {
  Performer a{};
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, op, ": q, k, v are (B, H, N, D)");
  STD_TORCH_CHECK(projection.dim() == 2, op, ": projection is (M, D)");
  STD_TORCH_CHECK(kernel == 0 || kernel == 1, op, ": kernel is 0 or 1");
  a.b = q.size(0), a.h = q.size(1), a.n = q.size(2), a.d = q.size(3), a.e = v.size(3);
  a.m = projection.size(0);
  check_shape(op, "k", k, {a.b, a.h, a.n, a.d});
  check_shape(op, "v", v, {a.b, a.h, a.n, a.e});
  check_shape(op, "projection", projection, {a.m, a.d});
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  check_dtype(op, "projection", projection, accumulator(q));
  if (mask) {
    check_shape(op, "key_mask", *mask, {a.b, a.n});
    check_dtype(op, "key_mask", *mask, ScalarType::Bool);
  }
  a.kernel = static_cast<int>(kernel), a.causal = causal, a.eps = eps;
  a.scale = 1 / std::sqrt(static_cast<double>(a.d)), a.root = std::sqrt(a.scale);
  a.tile = causal || a.d > 128 || a.e > 128 ? 32 : 64;  // causal tiles cost their square
  const int64_t tiles = (a.n + a.tile - 1) / a.tile;
  const int64_t wanted = segments(a.b * a.h, tiles);
  a.length = (tiles + wanted - 1) / wanted * a.tile;
  a.segments = (a.n + a.length - 1) / a.length;
  a.compensated = a.length > LONG;
  return a;
}

/// Room for the packed projection, filled.
template <class A>
Tensor pack(Performer& a, const PerformerKernels& kernels, const Tensor& projection) {
  const int64_t mp = up(a.m, 2 * kernels.lanes), dp = up(a.d, kernels.lanes);
  Tensor packed = torch::stable::new_empty(projection, {mp * (a.d + dp)});
  a.panels = packed.data_ptr(), a.rows = static_cast<A*>(a.panels) + mp * a.d;
  kernels.pack(a, torch::stable::contiguous(projection).data_ptr());
  return packed;
}

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward forward(Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> mask,
                std::optional<Tensor> s0, std::optional<Tensor> z0, std::optional<Tensor> c0,
                int64_t kernel, bool causal, double eps) {
  Performer a = prepare("performer_fwd", q, k, v, projection, mask, kernel, causal, eps);
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  if (mask) mask = torch::stable::contiguous(*mask);
  Tensor o = token_major(v, a.b, a.h, a.n, a.e);
  Tensor lse = torch::stable::new_empty(q, {a.b, a.h, a.n}, accumulator(q));
  a.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.o = Rows(o), a.lse = lse.data_ptr();

  return dispatch("performer_fwd", q, [&]<class T>() -> Forward {
    using A = acc_t<T>;
    const PerformerKernels& kernels = TAB_SELECT(performer_kernels<T>);
    const Tensor packed = pack<A>(a, kernels, projection);
    STD_TORCH_CHECK(s0.has_value() == c0.has_value(), "performer_fwd: s0, z0, c0 come together");
    const Tensors<A> first("performer_fwd", a, q, s0, z0, c0), last(a, q);
    const States<A> states(a, kernels.lanes);
    const int64_t heads = a.b * a.h, work = scratch_size(a, kernels.lanes), size = states.size;
    const auto outputs = causal ? kernels.causal_outputs : kernels.outputs;

    if (a.segments == 1) {
      parallel(heads, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + Arena<A>::cost(size));
        A* state = scratch.take(size);
        states.read(state, first, head);
        if (!causal) kernels.keys(a, head, state, scratch.next);
        outputs(a, head, state, scratch.next);
        states.write(state, last, head);
      });
      return {o, *last.s, *last.z, *last.c, lse};
    }
    Tensor buffer = torch::stable::new_empty(q, {heads * a.segments * size}, accumulator(q));
    A* all = static_cast<A*>(buffer.data_ptr());
    parallel(heads * a.segments, [&](int64_t task) {
      states.clear(all + task * size);
      kernels.keys(a, task, all + task * size, arena<A>(work).next);
    });
    parallel(heads, [&](int64_t head) {
      A* carry = arena<A>(size).next;
      states.read(carry, first, head);
      states.scan(all + head * a.segments * size, carry, false);
      states.write(carry, last, head);
    });
    parallel(heads * a.segments, [&](int64_t task) {
      const int64_t slot = causal ? task : task / a.segments * a.segments;
      outputs(a, task, all + slot * size, arena<A>(work).next);
    });
    return {o, *last.s, *last.z, *last.c, lse};
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward backward(Tensor grad, std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor q,
                  Tensor k, Tensor v, Tensor projection, Tensor o, Tensor s, Tensor z, Tensor c,
                  Tensor lse, std::optional<Tensor> mask, std::optional<Tensor> s0,
                  std::optional<Tensor> z0, std::optional<Tensor> c0, int64_t kernel, bool causal) {
  Performer a = prepare("performer_bwd", q, k, v, projection, mask, kernel, causal, 0);
  check_shape("performer_bwd", "do", grad, {a.b, a.h, a.n, a.e});
  check_shape("performer_bwd", "o", o, {a.b, a.h, a.n, a.e});
  check_shape("performer_bwd", "lse", lse, {a.b, a.h, a.n});
  check_dtype("performer_bwd", "do", grad, q.scalar_type());
  check_dtype("performer_bwd", "o", o, q.scalar_type());
  check_dtype("performer_bwd", "lse", lse, accumulator(q));
  q = unit_last(q), k = unit_last(k), v = unit_last(v), o = unit_last(o), grad = unit_last(grad);
  if (mask) mask = torch::stable::contiguous(*mask);
  lse = torch::stable::contiguous(lse);
  Tensor dq = token_major(q, a.b, a.h, a.n, a.d), dk = token_major(k, a.b, a.h, a.n, a.d);
  Tensor dv = token_major(v, a.b, a.h, a.n, a.e);
  a.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.o = Rows(o), a.grad = Rows(grad);
  a.dq = Rows(dq), a.dk = Rows(dk), a.dv = Rows(dv), a.lse = lse.data_ptr();

  return dispatch("performer_bwd", q, [&]<class T>() -> Backward {
    using A = acc_t<T>;
    const PerformerKernels& kernels = TAB_SELECT(performer_kernels<T>);
    const Tensor packed = pack<A>(a, kernels, projection);
    STD_TORCH_CHECK(s0.has_value() == c0.has_value(), "performer_bwd: s0, z0, c0 come together");
    const Tensors<A> first("performer_bwd", a, q, s0, z0, c0), last("performer_bwd", a, q, s, z, c);
    const Tensors<A> after("performer_bwd", a, q, ds, dz, c);
    std::optional<Tensors<A>> before;
    if (s0) before.emplace(a, q);
    const States<A> states(a, kernels.lanes);
    const int64_t heads = a.b * a.h, work = scratch_size(a, kernels.lanes), size = states.size;
    // The gradient of the state before the first token, out of x at shift `sign`·c.
    const auto leave = [&](A* x, int64_t head, A sign) {
      if (!before) return;
      for (int64_t m = 0; m < a.m; ++m) {
        const A shift = first.cp[head * a.m + m], at = states.c(x)[m];
        const A to = at == -States<A>::INF ? A(0) : sign * at;
        const A factor = kernel == 1 ? A(1) : std::exp(shift - to);
        A* row = x + m * states.ep;
        for (int64_t i = 0; i < a.e; ++i) row[i] *= factor;
        states.z(x)[m] *= factor;
      }
      states.write(x, *before, head);
    };
    const auto result = [&]() -> Backward {
      if (before) return {dq, dk, dv, *before->s, *before->z};
      const auto none = [&] { return torch::stable::new_empty(q, {0}, accumulator(q)); };
      return {dq, dk, dv, none(), none()};
    };

    if (a.segments == 1) {
      parallel(heads, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + 2 * Arena<A>::cost(size));
        A *state = scratch.take(size), *dstate = scratch.take(size);
        states.read(state, causal ? first : last, head);
        states.read(dstate, after, head, causal ? A(-1) : A(1));
        if (causal) {
          kernels.causal_queries(a, head, state, scratch.next);
          kernels.causal_gradients(a, head, dstate, scratch.next);
        } else {
          std::copy_n(states.c(state), states.mp, states.c(dstate));
          kernels.queries(a, head, state, dstate, scratch.next);
          kernels.gradients(a, head, dstate, scratch.next);
        }
        leave(dstate, head, causal ? A(-1) : A(1));
      });
      return result();
    }
    Tensor buffer = torch::stable::new_empty(q, {2, heads * a.segments * size}, accumulator(q));
    A *all = static_cast<A*>(buffer.data_ptr()), *dall = all + heads * a.segments * size;
    if (causal) {
      parallel(heads * a.segments, [&](int64_t task) {
        states.clear(all + task * size), states.clear(dall + task * size);
        kernels.keys(a, task, all + task * size, arena<A>(work).next);
        kernels.reads(a, task, dall + task * size, arena<A>(work).next);
      });
      parallel(heads, [&](int64_t head) {
        A* carry = arena<A>(size).next;
        states.read(carry, first, head);
        states.scan(all + head * a.segments * size, carry, false);
        states.read(carry, after, head, A(-1));
        states.scan(dall + head * a.segments * size, carry, true);
        leave(carry, head, A(-1));
      });
      parallel(heads * a.segments, [&](int64_t task) {
        kernels.causal_queries(a, task, all + task * size, arena<A>(work).next);
        kernels.causal_gradients(a, task, dall + task * size, arena<A>(work).next);
      });
      return result();
    }
    parallel(heads * a.segments, [&](int64_t task) {
      Arena<A> scratch = arena<A>(work + Arena<A>::cost(size));
      A *state = scratch.take(size), *dstate = dall + task * size;
      states.read(state, last, task / a.segments);
      states.clear(dstate);
      std::copy_n(states.c(state), states.mp, states.c(dstate));
      kernels.queries(a, task, state, dstate, scratch.next);
    });
    parallel(heads, [&](int64_t head) {
      A* carry = arena<A>(size).next;
      states.read(carry, after, head);
      states.scan(dall + head * a.segments * size, carry, false);
      leave(carry, head, A(1));
    });
    parallel(heads * a.segments, [&](int64_t task) {
      kernels.gradients(a, task, dall + task / a.segments * a.segments * size, arena<A>(work).next);
    });
    return result();
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("performer_fwd", TORCH_BOX(&tab::forward));
  m.impl("performer_bwd", TORCH_BOX(&tab::backward));
}
