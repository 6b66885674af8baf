// tab::gated_linear_fwd and tab::gated_linear_bwd on the CPU.
//
//     S_t = e^(g_t) S_{t-1} + k_t v_tᵀ,  o_t = scale·S_tᵀ q_t, one number g_t for a head and token
//     dS_t = e^(g_{t+1}) dS_{t+1} + scale·q_t do_tᵀ:  dq_t = scale·S_t do_t,  dk_t = dS_t v_t,
//     dv_t = dS_tᵀ k_t,  dg_t = Σ e^(g_t) S_{t-1}∘dS_t
//
// Yang et al. 2024, "Gated Linear Attention Transformers", §4; Dao and Gu 2024, §6. The sums run over
// tiles, with the quadratic form inside a tile. Its factors e^(g_{j+1} + … + g_i) grow row by row, by
// e^(g_i), and the factors of states are exponentials of sums: no difference of two sums is formed,
// so that nothing overflows and a strong decay costs what comes behind it no digits. The states
// before the tiles are kept for the backward pass, where dg needs both S and dS.
//
// How the work is cut: core/segments.h.

#include "gated_linear.h"

#define TAB_KERNEL "../gated_linear/gated_linear_kernel.h"
#include "../core/each_isa.h"

namespace tab {
namespace {

/// The common part of the arguments, once q, k and v are known.
void prepare(const char* op, Gated& a, const Tensor& q, const Tensor& g, double scale) {
  check_shape(op, "log_decay", g, {a.b, a.h, a.n, 1});
  check_dtype(op, "log_decay", g, accumulator(q));
  a.g = Rows(g), a.scale = scale, a.causal = true;
  a.cut(a.d > 128 || a.e > 128 ? 32 : 64);
}

/// A state (B, H, D, Dv), where there is one.
std::optional<Tensor> given(const char* op, const char* name, const Gated& a, const Tensor& q,
                            const std::optional<Tensor>& s) {
  if (!s) return s;
  check_shape(op, name, *s, {a.b, a.h, a.d, a.e});
  check_dtype(op, name, *s, accumulator(q));
  return contiguous(s);
}
template <class A>
A* data(const std::optional<Tensor>& s) {
  return s ? static_cast<A*>(s->data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Tensor g,
                                   std::optional<Tensor> mask, std::optional<Tensor> s0,
                                   double scale) {
  constexpr const char* op = "gated_linear_fwd";
  Gated a{};
  const Inputs in(op, a, q, k, v, mask);
  prepare(op, a, q, g, scale);
  s0 = given(op, "S", a, q, s0);
  const Tensor o = token_major(in.v, a.b, a.h, a.n, a.e);
  const Tensor s = empty(in.q, {a.b, a.h, a.d, a.e}, accumulator(in.q));
  a.o = Rows(o), a.stream = large(o);

  return dispatch(op, in.q, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = acc_t<T>;
    const GatedKernels& kernels = TAB_SELECT(gated_kernels<T>);
    const GatedStates<A> states(a, kernels.lanes);
    A *const first = data<A>(s0), *const last = static_cast<A*>(s.data_ptr());
    attend<A>(a, a, states, scratch_size(a, kernels.lanes), in.q, kernels.keys, kernels.outputs,
              first, last);
    return {o, s};
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward backward(Tensor grad, std::optional<Tensor> ds, Tensor q, Tensor k, Tensor v, Tensor g,
                  std::optional<Tensor> mask, std::optional<Tensor> s0, double scale) {
  constexpr const char* op = "gated_linear_bwd";
  Gated a{};
  const Inputs in(op, a, q, k, v, mask);
  prepare(op, a, q, g, scale);
  check_output(op, "do", grad, q, a.e);
  s0 = given(op, "S", a, q, s0), ds = given(op, "dS", a, q, ds);
  grad = unit_last(grad);
  const Gradients out(a, in);
  const Tensor dg = token_major(g, a.b, a.h, a.n, 1);
  const Tensor ds0 = empty(in.q, {a.b, a.h, a.d, a.e}, accumulator(in.q));
  a.grad = Rows(grad), a.dg = Rows(dg), a.stream = large(out.dq);

  return dispatch(op, in.q, [&]<class T>() -> Backward {
    using A = acc_t<T>;
    const GatedKernels& kernels = TAB_SELECT(gated_kernels<T>);
    const GatedStates<A> states(a, kernels.lanes);
    const int64_t work = scratch_size(a, kernels.lanes), size = states.size;
    const Tensor kept =
        torch::stable::new_empty(g, {a.b * a.h * ceiling(a.n, a.tile) * a.d * states.ep});
    const Gated adding = a;  // which keeps no states
    a.kept = kept.data_ptr();
    const auto first = [&](A* x, int64_t head) { states.read(x, data<A>(s0), head); };
    const auto last = [&](A* x, int64_t head) { states.read(x, data<A>(ds), head); };
    const auto initial = [&](A* x, int64_t head) {
      states.write(x, static_cast<A*>(ds0.data_ptr()), head);
    };
    const Backward result{out.dq, out.dk, out.dv, dg, ds0};

    if (a.segments == 1) {
      parallel(a.b * a.h, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + Arena<A>::cost(size));
        A* state = scratch.take(size);
        first(state, head);
        kernels.keys(a, head, state, scratch.next);
        last(state, head);
        kernels.gradients(a, head, state, scratch.next);
        initial(state, head);
      });
      return result;
    }
    const SegmentStates<A, GatedStates<A>> sums(a, states, work, in.q),
        dsums(a, states, work, in.q);
    sums.sum(adding, kernels.keys);
    sums.scan(false, first, [](A*, int64_t) {});
    sums.run(a, kernels.keys);
    dsums.sum(a, kernels.reads);
    dsums.scan(true, last, initial);
    dsums.run(a, kernels.gradients);
    return result;
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("gated_linear_fwd", TORCH_BOX(&tab::forward));
  m.impl("gated_linear_bwd", TORCH_BOX(&tab::backward));
}
