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
void prepare(const char* op, Gated& a, const Ends& ends, const Inputs& in, const Tensor& g,
             double scale) {
  a.share(in);
  check_shape(op, "log_decay", g, {a.b, a.h, a.n, 1});
  check_dtype(op, "log_decay", g, accumulator(in.q));
  a.g = Rows(g), a.scale = scale, a.causal = true;
  a.states = ends.packed ? ends.count() : a.b;
  a.cut(a.d > 128 || a.e > 128 ? 32 : 64, a.b * a.h);
}

template <class T>
std::vector<Problem<Gated>> cut(Gated& a, const Ends& ends) {
  return problems<T>(a, a.n, ends, [](Gated& x, int64_t from) {
    skip<acc_t<T>>(x.g, from), skip<acc_t<T>>(x.dg, from);
  });
}

/// A state (B, H_kv, D, Dv), where there is one.
std::optional<Tensor> given(const char* op, const char* name, const Gated& a, const Tensor& q,
                            const std::optional<Tensor>& s) {
  if (!s) return s;
  check_shape(op, name, *s, {a.states, a.h, a.d, a.e});
  check_dtype(op, name, *s, accumulator(q));
  return contiguous(s);
}
/// One to be written, if anybody asks for it.
std::optional<Tensor> fresh(const Gated& a, const Tensor& q, bool wanted) {
  if (!wanted) return {};
  return empty(q, {a.states, a.h, a.d, a.e}, accumulator(q));
}
template <class A>
A* data(const std::optional<Tensor>& s) {
  return s ? static_cast<A*>(s->data_ptr()) : nullptr;
}

using Forward = std::tuple<Tensor, Tensor>;

Forward forward(const char* op, const Ends& ends, Gated& a, const Inputs& in, const Tensor& g,
                std::optional<Tensor> s0, double scale, bool state) {
  prepare(op, a, ends, in, g, scale);
  s0 = given(op, "S", a, in.q, s0);
  const Tensor o = token_major(in.v, a.b, in.q.size(1), a.n, a.e);
  const std::optional<Tensor> s = fresh(a, in.q, state);
  a.o = Rows(o), a.stream = large(o);

  return dispatch(op, in.q, [&]<class T>() -> Forward {
    using A = acc_t<T>;
    const GatedKernels& kernels = TAB_SELECT(gated_kernels<T>);
    const std::vector<Problem<Gated>> each = cut<T>(a, ends);
    const GatedStates<A> states(a, kernels.lanes);
    A *const first = data<A>(s0), *const last = data<A>(s);
    attend<A>(each, states, scratch_size(a, kernels.lanes), in.q, kernels.keys, kernels.outputs,
              first, last);
    return {o, s.value_or(Tensor())};
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward backward(const char* op, const Ends& ends, Gated& a, const Inputs& in, Tensor grad,
                  std::optional<Tensor> ds, const Tensor& g, std::optional<Tensor> s0, double scale,
                  bool state) {
  prepare(op, a, ends, in, g, scale);
  check_output(op, "do", grad, in.q, a.e);
  s0 = given(op, "S", a, in.q, s0), ds = given(op, "dS", a, in.q, ds);
  grad = unit_last(grad);
  const Gradients out(a, in);
  const Tensor dg = token_major(g, a.b, a.h, a.n, 1);
  const std::optional<Tensor> ds0 = fresh(a, in.q, state);
  a.grad = Rows(grad), a.dg = Rows(dg), a.stream = large(out.dq);

  return dispatch(op, in.q, [&]<class T>() -> Backward {
    using A = acc_t<T>;
    const GatedKernels& kernels = TAB_SELECT(gated_kernels<T>);
    std::vector<Problem<Gated>> each = cut<T>(a, ends);
    const GatedStates<A> states(a, kernels.lanes);
    const int64_t work = scratch_size(a, kernels.lanes), size = states.size;
    const auto kept_by = [&](const Gated& x) {  // numbers
      return x.b * x.h * ceiling(x.n, x.tile) * x.d * states.ep;
    };
    int64_t room = 0;
    for (const auto& x : each) room += kept_by(x.a);
    const Tensor kept = torch::stable::new_empty(g, {room});
    A* at = static_cast<A*>(kept.data_ptr());
    for (auto& x : each) x.a.kept = at, at += kept_by(x.a);  // x.kv keeps no states
    const auto first = [&](A* x, int64_t slot) { states.read(x, data<A>(s0), slot); };
    const auto last = [&](A* x, int64_t slot) { states.read(x, data<A>(ds), slot); };
    const auto initial = [&](A* x, int64_t slot) { states.write(x, data<A>(ds0), slot); };
    const Backward result{out.dq, out.dk, out.dv, dg, ds0.value_or(Tensor())};

    if (whole(each)) {
      each_head(each, [&](const Problem<Gated>& x, int64_t head, int64_t slot) {
        Arena<A> scratch = arena<A>(work + Arena<A>::cost(size));
        A* state = scratch.take(size);
        first(state, slot);
        kernels.keys(x.a, head, state, scratch.next);
        last(state, slot);
        kernels.gradients(x.a, head, state, scratch.next);
        initial(state, slot);
      });
      return result;
    }
    int64_t slot = 0;  // of the first head
    for (const auto& [x, adding] : each) {
      const auto moved = [&](const auto& f) {
        return [&](A* state, int64_t head) { f(state, slot + head); };
      };
      const SegmentStates<A, GatedStates<A>> sums(x, states, work, in.q),
          dsums(x, states, work, in.q);
      sums.sum(adding, kernels.keys);
      sums.scan(false, moved(first), [](A*, int64_t) {});
      sums.run(x, kernels.keys);
      dsums.sum(x, kernels.reads);
      dsums.scan(true, moved(last), moved(initial));
      dsums.run(x, kernels.gradients);
      slot += x.b * x.h;
    }
    return result;
  });
}

// --- dense and packed -----------------------------------------------------------------------------

// Without `state` only what depends on the tokens is returned.
template <bool state>
std::conditional_t<state, Forward, Tensor> dense_forward(Tensor q, Tensor k, Tensor v, Tensor g,
                                                         std::optional<Tensor> mask,
                                                         std::optional<Tensor> s0, double scale) {
  constexpr const char* op = state ? "gated_linear_fwd" : "gated_linear_stateless_fwd";
  Gated a{};
  const Inputs in(op, a, q, k, v, mask, true);
  const Forward got = forward(op, {}, a, in, g, s0, scale, state);
  if constexpr (state)
    return got;
  else
    return std::get<0>(got);
}

Forward packed_forward(Tensor q, Tensor k, Tensor v, Tensor g, std::optional<Tensor> mask,
                       std::optional<Tensor> s0, Tensor cu_seqlens, double scale) {
  constexpr const char* op = "gated_linear_packed_fwd";
  Gated a{};
  const Inputs in(op, a, q, k, v, mask, true);
  return forward(op, Ends(op, cu_seqlens, a.b, a.n), a, in, g, s0, scale, true);
}

template <bool state>
std::conditional_t<state, Backward, std::tuple<Tensor, Tensor, Tensor, Tensor>> dense_backward(
    Tensor grad, std::optional<Tensor> ds, Tensor q, Tensor k, Tensor v, Tensor g,
    std::optional<Tensor> mask, std::optional<Tensor> s0, double scale) {
  constexpr const char* op = state ? "gated_linear_bwd" : "gated_linear_stateless_bwd";
  Gated a{};
  const Inputs in(op, a, q, k, v, mask, true);
  const Backward got = backward(op, {}, a, in, grad, ds, g, s0, scale, state);
  if constexpr (state)
    return got;
  else
    return {std::get<0>(got), std::get<1>(got), std::get<2>(got), std::get<3>(got)};
}

Backward packed_backward(Tensor q, Tensor k, Tensor v, Tensor g, std::optional<Tensor> mask,
                         std::optional<Tensor> s0, Tensor o, Tensor /* s */,
                         std::optional<Tensor> grad, std::optional<Tensor> ds, Tensor cu_seqlens,
                         double scale) {
  constexpr const char* op = "gated_linear_packed_bwd";
  Gated a{};
  const Inputs in(op, a, q, k, v, mask, true);
  const Ends ends(op, cu_seqlens, a.b, a.n);
  Backward got = backward(op, ends, a, in, or_zeros(grad, o), ds, g, s0, scale, s0.has_value());
  if (!s0) std::get<4>(got) = nothing(in.q);
  return got;
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("gated_linear_fwd", TORCH_BOX(&tab::dense_forward<true>));
  m.impl("gated_linear_bwd", TORCH_BOX(&tab::dense_backward<true>));
  m.impl("gated_linear_stateless_fwd", TORCH_BOX(&tab::dense_forward<false>));
  m.impl("gated_linear_stateless_bwd", TORCH_BOX(&tab::dense_backward<false>));
}
STABLE_TORCH_LIBRARY_IMPL(tab_packed, CPU, m) {
  m.impl("gated_linear_packed_fwd", TORCH_BOX(&tab::packed_forward));
  m.impl("gated_linear_packed_bwd", TORCH_BOX(&tab::packed_backward));
}
