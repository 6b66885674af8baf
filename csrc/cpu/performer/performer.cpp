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
#include "performer_states.h"

namespace tab {
namespace {

/// The common part of the arguments, once q, k and v are known.
void prepare(const char* op, Performer& a, const Inputs& in, const Ends& ends,
             const Tensor& projection, int64_t kernel, bool causal, double eps) {
  STD_TORCH_CHECK(projection.dim() == 2, op, ": projection is (M, D)");
  STD_TORCH_CHECK(kernel == 0 || kernel == 1, op, ": kernel is 0 or 1");
  a.m = projection.size(0);
  check_shape(op, "projection", projection, {a.m, a.d});
  check_dtype(op, "projection", projection, accumulator(in.q));
  a.share(in);
  a.kernel = static_cast<int>(kernel), a.causal = causal, a.eps = eps;
  a.scale = 1 / std::sqrt(static_cast<double>(a.d)), a.root = std::sqrt(a.scale);
  a.states = ends.packed ? ends.count() : a.b, a.row = a.n;
  a.cut(causal || a.d > 128 || a.e > 128 ? 32 : 64, a.b * a.h);  // causal tiles cost their square
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

template <class T>
std::vector<Problem<Performer>> cut(Performer& a, const Inputs& in, const Ends& ends) {
  return problems<T>(a, in.k.size(2), ends, [](Performer& x, int64_t from) {
    x.lse = static_cast<acc_t<T>*>(x.lse) + from;
  });
}

using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

/// What both passes are given beside q, k and v.
struct Given {
  Tensor projection;
  std::optional<Tensor> s0, z0, c0;
  int64_t kernel;
  bool causal;
  double eps;
};

Five forward(const char* op, const Ends& ends, Performer& a, const Inputs& in, const Given& given,
             bool state) {
  prepare(op, a, in, ends, given.projection, given.kernel, given.causal, given.eps);
  STD_TORCH_CHECK(given.s0.has_value() == given.c0.has_value(), op, ": S, z and c come together");
  const int64_t heads = in.q.size(1);
  const Tensor o = token_major(in.v, a.b, heads, a.n, a.e);
  const Tensor lse = torch::stable::new_empty(in.q, {a.b, heads, a.n}, accumulator(in.q));
  a.o = Rows(o), a.lse = lse.data_ptr();

  return dispatch(op, in.q, [&]<class T>() -> Five {
    using A = acc_t<T>;
    const PerformerKernels& kernels = TAB_SELECT(performer_kernels<T>);
    const Tensor packed = pack<A>(a, kernels, given.projection);
    const std::vector<Problem<Performer>> each = cut<T>(a, in, ends);
    const Triple<A> first(op, a, in.q, given.s0, given.z0, given.c0), last(a, in.q, state);
    const PerformerStates<A> states(a, kernels.lanes);
    attend<A>(each, states, scratch_size(a, kernels.lanes), in.q, kernels.keys,
              a.causal ? kernels.causal_outputs : kernels.outputs, first, last);
    if (!state) return {o, Tensor(), Tensor(), Tensor(), lse};
    return {o, *last.s, *last.z, *last.c, lse};
  });
}

Five backward(const char* op, const Ends& ends, Performer& a, const Inputs& in, Tensor grad,
              const std::optional<Tensor>& ds, const std::optional<Tensor>& dz, Tensor o,
              const Tensor& s, const Tensor& z, const Tensor& c, Tensor lse, const Given& given) {
  prepare(op, a, in, ends, given.projection, given.kernel, given.causal, 0);
  STD_TORCH_CHECK(given.s0.has_value() == given.c0.has_value(), op, ": S, z and c come together");
  check_output(op, "do", grad, in.q, a.e);
  check_output(op, "o", o, in.q, a.e);
  check_lse(op, "lse", lse, in.q);
  o = unit_last(o), grad = unit_last(grad), lse = torch::stable::contiguous(lse);
  const Gradients out(a, in);
  a.o = Rows(o), a.grad = Rows(grad), a.lse = lse.data_ptr();

  return dispatch(op, in.q, [&]<class T>() -> Five {
    using A = acc_t<T>;
    const bool causal = a.causal;
    const PerformerKernels& kernels = TAB_SELECT(performer_kernels<T>);
    const Tensor packed = pack<A>(a, kernels, given.projection);
    const std::vector<Problem<Performer>> each = cut<T>(a, in, ends);
    const Triple<A> first(op, a, in.q, given.s0, given.z0, given.c0);
    const Triple<A> last(op, a, in.q, s, z, c), after(op, a, in.q, ds, dz, c);
    const Triple<A> initial(a, in.q, given.s0.has_value());
    const PerformerStates<A> states(a, kernels.lanes);
    const int64_t work = scratch_size(a, kernels.lanes), size = states.size;
    const A sign = causal ? -1 : 1;  // of the shift that a gradient state carries
    // The gradient of the state before the first token, out of x.
    const auto leave = [&](A* x, int64_t slot) {
      if (!initial.s) return;
      for (int64_t m = 0; m < a.m; ++m) {
        const A shift = first.cp[slot * a.m + m], at = states.c(x)[m];
        const A to = at == -PerformerStates<A>::INF ? A(0) : sign * at;
        const A factor = a.kernel == 1 ? A(1) : std::exp(shift - to);
        A* row = x + m * states.ep;
        for (int64_t i = 0; i < a.e; ++i) row[i] *= factor;
        states.z(x)[m] *= factor;
      }
      states.write(x, initial, slot);
    };
    const auto behind = [&](A* x, int64_t slot) { states.read(x, after, slot, sign); };
    const auto result = [&]() -> Five {
      if (initial.s) return {out.dq, out.dk, out.dv, *initial.s, *initial.z};
      const auto none = [&] { return torch::stable::new_empty(in.q, {0}, accumulator(in.q)); };
      return {out.dq, out.dk, out.dv, none(), none()};
    };

    if (whole(each)) {
      each_head(each, [&](const Problem<Performer>& x, int64_t head, int64_t slot) {
        Arena<A> scratch = arena<A>(work + 2 * Arena<A>::cost(size));
        A *state = scratch.take(size), *dstate = scratch.take(size);
        states.read(state, causal ? first : last, slot);
        behind(dstate, slot);
        if (causal) {
          kernels.causal_queries(x.a, head, state, scratch.next);
          kernels.causal_gradients(x.a, head, dstate, scratch.next);
        } else {
          std::copy_n(states.c(state), states.mp, states.c(dstate));
          kernels.queries(x.a, head, state, dstate, scratch.next);
          kernels.gradients(x.kv, head, dstate, scratch.next);
        }
        leave(dstate, slot);
      });
      return result();
    }
    int64_t slot = 0;  // of the first head
    for (const auto& [x, kv] : each) {
      const auto moved = [&](const auto& f) {
        return [&](A* state, int64_t head) { f(state, slot + head); };
      };
      const SegmentStates<A, PerformerStates<A>> dsums(x, states, work, in.q);
      if (causal) {
        const SegmentStates<A, PerformerStates<A>> sums(x, states, work, in.q);
        sums.sum(x, kernels.keys);
        dsums.sum(x, kernels.reads);
        sums.scan(
            false, [&](A* state, int64_t head) { states.read(state, first, slot + head); },
            [](A*, int64_t) {});
        dsums.scan(true, moved(behind), moved(leave));
        sums.run(x, kernels.causal_queries);
        dsums.run(x, kernels.causal_gradients);
      } else {
        parallel(x.b * x.h * x.segments, [&, &x = x](int64_t task) {
          Arena<A> scratch = arena<A>(work + Arena<A>::cost(size));
          A *state = scratch.take(size), *dstate = dsums.of(task);
          states.read(state, last, slot + task / x.segments);
          states.clear(dstate);
          std::copy_n(states.c(state), states.mp, states.c(dstate));
          kernels.queries(x, task, state, dstate, scratch.next);
        });
        dsums.scan(false, moved(behind), moved(leave));
        dsums.run(kv, kernels.gradients);
      }
      slot += x.b * x.h;
    }
    return result();
  });
}

// --- dense and packed -----------------------------------------------------------------------------

Five dense_forward(Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> mask,
                   std::optional<Tensor> s0, std::optional<Tensor> z0, std::optional<Tensor> c0,
                   int64_t kernel, bool causal, double eps) {
  Performer a{};
  const Inputs in("performer_fwd", a, q, k, v, mask, true, !causal);
  return forward("performer_fwd", {}, a, in, {projection, s0, z0, c0, kernel, causal, eps}, true);
}

Tensor stateless_forward(Tensor q, Tensor k, Tensor v, Tensor projection,
                         std::optional<Tensor> mask, std::optional<Tensor> s0,
                         std::optional<Tensor> z0, std::optional<Tensor> c0, int64_t kernel,
                         bool causal, double eps) {
  constexpr const char* op = "performer_stateless_fwd";
  Performer a{};
  const Inputs in(op, a, q, k, v, mask, true, !causal);
  return std::get<0>(forward(op, {}, a, in, {projection, s0, z0, c0, kernel, causal, eps}, false));
}

Five packed_forward(Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> mask,
                    std::optional<Tensor> s0, std::optional<Tensor> z0, std::optional<Tensor> c0,
                    Tensor cu_seqlens, int64_t kernel, bool causal, double eps) {
  constexpr const char* op = "performer_packed_fwd";
  Performer a{};
  const Inputs in(op, a, q, k, v, mask, true);
  const Ends ends(op, cu_seqlens, a.b, a.n);
  return forward(op, ends, a, in, {projection, s0, z0, c0, kernel, causal, eps}, true);
}

Five dense_backward(Tensor grad, std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor q,
                    Tensor k, Tensor v, Tensor projection, Tensor o, Tensor s, Tensor z, Tensor c,
                    Tensor lse, std::optional<Tensor> mask, std::optional<Tensor> s0,
                    std::optional<Tensor> z0, std::optional<Tensor> c0, int64_t kernel,
                    bool causal) {
  Performer a{};
  const Inputs in("performer_bwd", a, q, k, v, mask, true, !causal);
  const Given given{projection, s0, z0, c0, kernel, causal, 0};
  return backward("performer_bwd", {}, a, in, grad, ds, dz, o, s, z, c, lse, given);
}

Five packed_backward(Tensor q, Tensor k, Tensor v, Tensor projection, std::optional<Tensor> mask,
                     std::optional<Tensor> s0, std::optional<Tensor> z0, std::optional<Tensor> c0,
                     Tensor o, Tensor s, Tensor z, Tensor c, Tensor lse, std::optional<Tensor> grad,
                     std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor cu_seqlens,
                     int64_t kernel, bool causal, double) {
  constexpr const char* op = "performer_packed_bwd";
  Performer a{};
  const Inputs in(op, a, q, k, v, mask, true);
  const Ends ends(op, cu_seqlens, a.b, a.n);
  if (ds.has_value() != dz.has_value()) ds = or_zeros(ds, s), dz = or_zeros(dz, z);
  const Given given{projection, s0, z0, c0, kernel, causal, 0};
  Five got = backward(op, ends, a, in, or_zeros(grad, o), ds, dz, o, s, z, c, lse, given);
  if (!s0) std::get<3>(got) = std::get<4>(got) = nothing(in.q);
  return got;
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("performer_fwd", TORCH_BOX(&tab::dense_forward));
  m.impl("performer_bwd", TORCH_BOX(&tab::dense_backward));
  m.impl("performer_stateless_fwd", TORCH_BOX(&tab::stateless_forward));
}
STABLE_TORCH_LIBRARY_IMPL(tab_packed, CPU, m) {
  m.impl("performer_packed_fwd", TORCH_BOX(&tab::packed_forward));
  m.impl("performer_packed_bwd", TORCH_BOX(&tab::packed_backward));
}
