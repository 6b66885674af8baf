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
// How the work is cut: core/segments.h.

#include "performer.h"

#define TAB_KERNEL "../performer/performer_kernel.h"
#include "../core/each_isa.h"

namespace tab {
namespace {

/// The common part of the arguments, once q, k and v are known.
void prepare(const char* op, Performer& a, const Tensor& q, const Tensor& projection,
             int64_t kernel, bool causal, double eps) {
  STD_TORCH_CHECK(projection.dim() == 2, op, ": projection is (M, D)");
  STD_TORCH_CHECK(kernel == 0 || kernel == 1, op, ": kernel is 0 or 1");
  a.m = projection.size(0);
  check_shape(op, "projection", projection, {a.m, a.d});
  check_dtype(op, "projection", projection, accumulator(q));
  a.kernel = static_cast<int>(kernel), a.causal = causal, a.eps = eps;
  a.scale = 1 / std::sqrt(static_cast<double>(a.d)), a.root = std::sqrt(a.scale);
  a.cut(causal || a.d > 128 || a.e > 128 ? 32 : 64);  // causal tiles cost their square
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

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Five forward(Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> mask,
             std::optional<Tensor> s0, std::optional<Tensor> z0, std::optional<Tensor> c0,
             int64_t kernel, bool causal, double eps) {
  constexpr const char* op = "performer_fwd";
  Performer a{};
  const Inputs in(op, a, q, k, v, mask, false, !causal);
  prepare(op, a, q, projection, kernel, causal, eps);
  STD_TORCH_CHECK(s0.has_value() == c0.has_value(), op, ": S, z and c come together");
  const Tensor o = token_major(in.v, a.b, a.h, a.n, a.e);
  const Tensor lse = torch::stable::new_empty(in.q, {a.b, a.h, a.n}, accumulator(in.q));
  a.o = Rows(o), a.lse = lse.data_ptr();

  return dispatch(op, in.q, [&]<class T>() -> Five {
    using A = acc_t<T>;
    const PerformerKernels& kernels = TAB_SELECT(performer_kernels<T>);
    const Tensor packed = pack<A>(a, kernels, projection);
    const Performer kv = over_keys(a, in.k.size(2));
    const Triple<A> first(op, a, in.q, s0, z0, c0), last(a, in.q);
    const PerformerStates<A> states(a, kernels.lanes);
    attend<A>(a, kv, states, scratch_size(a, kernels.lanes), in.q, kernels.keys,
              causal ? kernels.causal_outputs : kernels.outputs, first, last);
    return {o, *last.s, *last.z, *last.c, lse};
  });
}

Five backward(Tensor grad, std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor q, Tensor k,
              Tensor v, Tensor projection, Tensor o, Tensor s, Tensor z, Tensor c, Tensor lse,
              std::optional<Tensor> mask, std::optional<Tensor> s0, std::optional<Tensor> z0,
              std::optional<Tensor> c0, int64_t kernel, bool causal) {
  constexpr const char* op = "performer_bwd";
  Performer a{};
  const Inputs in(op, a, q, k, v, mask, false, !causal);
  prepare(op, a, q, projection, kernel, causal, 0);
  STD_TORCH_CHECK(s0.has_value() == c0.has_value(), op, ": S, z and c come together");
  check_output(op, "do", grad, q, a.e);
  check_output(op, "o", o, q, a.e);
  check_lse(op, "lse", lse, q);
  o = unit_last(o), grad = unit_last(grad), lse = torch::stable::contiguous(lse);
  const Gradients out(a, in);
  a.o = Rows(o), a.grad = Rows(grad), a.lse = lse.data_ptr();

  return dispatch(op, in.q, [&]<class T>() -> Five {
    using A = acc_t<T>;
    const PerformerKernels& kernels = TAB_SELECT(performer_kernels<T>);
    const Tensor packed = pack<A>(a, kernels, projection);
    const Performer kv = over_keys(a, in.k.size(2));
    const Triple<A> first(op, a, in.q, s0, z0, c0), last(op, a, in.q, s, z, c);
    const Triple<A> after(op, a, in.q, ds, dz, c);
    std::optional<Triple<A>> initial;
    if (s0) initial.emplace(a, in.q);
    const PerformerStates<A> states(a, kernels.lanes);
    const int64_t work = scratch_size(a, kernels.lanes), size = states.size;
    const A sign = causal ? -1 : 1;  // of the shift that a gradient state carries
    // The gradient of the state before the first token, out of x.
    const auto leave = [&](A* x, int64_t head) {
      if (!initial) return;
      for (int64_t m = 0; m < a.m; ++m) {
        const A shift = first.cp[head * a.m + m], at = states.c(x)[m];
        const A to = at == -PerformerStates<A>::INF ? A(0) : sign * at;
        const A factor = kernel == 1 ? A(1) : std::exp(shift - to);
        A* row = x + m * states.ep;
        for (int64_t i = 0; i < a.e; ++i) row[i] *= factor;
        states.z(x)[m] *= factor;
      }
      states.write(x, *initial, head);
    };
    const auto behind = [&](A* x, int64_t head) { states.read(x, after, head, sign); };
    const auto result = [&]() -> Five {
      if (initial) return {out.dq, out.dk, out.dv, *initial->s, *initial->z};
      const auto none = [&] { return torch::stable::new_empty(in.q, {0}, accumulator(in.q)); };
      return {out.dq, out.dk, out.dv, none(), none()};
    };

    if (a.segments == 1 && kv.segments == 1) {
      parallel(a.b * a.h, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + 2 * Arena<A>::cost(size));
        A *state = scratch.take(size), *dstate = scratch.take(size);
        states.read(state, causal ? first : last, head);
        behind(dstate, head);
        if (causal) {
          kernels.causal_queries(a, head, state, scratch.next);
          kernels.causal_gradients(a, head, dstate, scratch.next);
        } else {
          std::copy_n(states.c(state), states.mp, states.c(dstate));
          kernels.queries(a, head, state, dstate, scratch.next);
          kernels.gradients(kv, head, dstate, scratch.next);
        }
        leave(dstate, head);
      });
      return result();
    }
    const SegmentStates<A, PerformerStates<A>> dsums(a, states, work, in.q);
    if (causal) {
      const SegmentStates<A, PerformerStates<A>> sums(a, states, work, in.q);
      sums.sum(a, kernels.keys);
      dsums.sum(a, kernels.reads);
      sums.scan(
          false, [&](A* x, int64_t head) { states.read(x, first, head); }, [](A*, int64_t) {});
      dsums.scan(true, behind, leave);
      sums.run(a, kernels.causal_queries);
      dsums.run(a, kernels.causal_gradients);
      return result();
    }
    parallel(a.b * a.h * a.segments, [&](int64_t task) {
      Arena<A> scratch = arena<A>(work + Arena<A>::cost(size));
      A *state = scratch.take(size), *dstate = dsums.of(task);
      states.read(state, last, task / a.segments);
      states.clear(dstate);
      std::copy_n(states.c(state), states.mp, states.c(dstate));
      kernels.queries(a, task, state, dstate, scratch.next);
    });
    dsums.scan(false, behind, leave);
    dsums.run(kv, kernels.gradients);
    return result();
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("performer_fwd", TORCH_BOX(&tab::forward));
  m.impl("performer_bwd", TORCH_BOX(&tab::backward));
}
