// tab::linear_fwd and tab::linear_bwd on the CPU.
//
//     o_i = φ(q_i)ᵀS / (φ(q_i)ᵀz + ε),  S = Σ_j φ(k_j) v_jᵀ,  z = Σ_j φ(k_j);  causal: over j ≤ i
//     g_i = do_i/den_i, r_i = -g_i·o_i:  dφ(q_i) = S g_i + z r_i,  dS = Σ_i φ(q_i) g_iᵀ (i ≥ j),
//     dz = Σ_i φ(q_i) r_i,  dφ(k_j) = dS v_j + dz,  dv_j = dSᵀφ(k_j)
//
// r_i needs no o: g_i·o_i = φ(q_i)ᵀ(S g_i)/den_i, and S g_i is there. Bidirectional, S and z are
// those of the forward pass; causal, they are summed again.
//
// Katharopoulos et al. 2020, eq. 4-5 and 9-12; the causal sums run over tiles, with the quadratic
// form inside a tile. φ is recomputed in the backward pass and never reaches memory.
//
// How the work is cut: core/segments.h. The order φ(q)(φ(k)ᵀv) is taken at every N: the quadratic one
// could win only below N = D, and where S is asked for, or kept for the backward, below N = D/2.

#include "linear.h"

#define TAB_KERNEL "../linear/linear_kernel.h"
#include "../core/each_isa.h"
#include "linear_states.h"

namespace tab {
namespace {

/// Kernels with the sizes built in where D = Dv = 64, and those of linear_wide.h where they serve.
template <class T>
const LinearKernels& kernels_for(const Linear& a) {
#if TAB_WIDE
  const LinearKernels& wide = avx512::linear_kernels_wide<T>;
  if (isa() == Isa::avx512 && !a.causal && a.d == 4 * wide.lanes && a.e == a.d) return wide;
#endif
  if (a.d == 64 && a.e == 64) return TAB_SELECT(linear_kernels_64<T>);
  return TAB_SELECT(linear_kernels<T>);
}

/// The common part of the arguments, once q, k and v are known.
void prepare(const char* op, Linear& a, const Inputs& in, const Ends& ends, int64_t map,
             bool causal, double eps) {
  STD_TORCH_CHECK(map >= 0 && map <= 2, op, ": feature_map is 0, 1 or 2");
  a.share(in);
  a.map = static_cast<int>(map), a.causal = causal, a.eps = eps;
  a.states = ends.packed ? ends.count() : a.b;
  a.cut(a.d > 128 || a.e > 128 ? 32 : 64, a.b * a.h);
}

template <class T>
std::vector<Problem<Linear>> cut(Linear& a, const Inputs& in, const Ends& ends) {
  return problems<T>(a, in.k.size(2), ends, [&](Linear& x, int64_t from) {
    if (a.notes != nullptr) x.notes = static_cast<acc_t<T>*>(a.notes) + 2 * a.h * a.group * from;
  });
}

using Forward = std::tuple<Tensor, Tensor, Tensor>;

Forward forward(const char* op, const Ends& ends, Linear& a, const Inputs& in,
                const std::optional<Tensor>& s0, const std::optional<Tensor>& z0, int64_t map,
                bool causal, double eps, bool state) {
  prepare(op, a, in, ends, map, causal, eps);
  const Tensor o = token_major(in.v, a.b, in.q.size(1), a.n, a.e);
  a.o = Rows(o), a.stream = large(o);

  return dispatch(op, in.q, [&]<class T>() -> Forward {
    using A = acc_t<T>;
    const LinearKernels& kernels = kernels_for<T>(a);
    const std::vector<Problem<Linear>> each = cut<T>(a, in, ends);
    const Pair<A> first(op, a, in.q, s0, z0), last(a, in.q, state);
    const LinearStates<A> states(a, kernels.lanes);
    attend<A>(each, states, scratch_size(a, kernels.lanes), in.q, kernels.keys, kernels.outputs,
              first, last);
    return {o, last.s.value_or(Tensor()), last.z.value_or(Tensor())};
  });
}

using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

Backward backward(const char* op, const Ends& ends, Linear& a, const Inputs& in, Tensor grad,
                  const std::optional<Tensor>& ds, const std::optional<Tensor>& dz, const Tensor& s,
                  const Tensor& z, const std::optional<Tensor>& s0, const std::optional<Tensor>& z0,
                  int64_t map, bool causal, double eps, bool state) {
  prepare(op, a, in, ends, map, causal, eps);
  check_output(op, "do", grad, in.q, a.e);
  grad = unit_last(grad);
  const Gradients out(a, in);
  a.grad = Rows(grad), a.stream = large(out.dq);
  std::optional<Tensor> notes;
  if (causal) {
    notes = torch::stable::new_empty(in.q, {a.b, a.h * a.group, 2, a.n}, accumulator(in.q));
    a.notes = notes->data_ptr();
  }

  return dispatch(op, in.q, [&]<class T>() -> Backward {
    using A = acc_t<T>;
    const LinearKernels& kernels = kernels_for<T>(a);
    const std::vector<Problem<Linear>> each = cut<T>(a, in, ends);
    const Pair<A> first(op, a, in.q, s0, z0), total(op, a, in.q, s, z);
    const Pair<A> last(op, a, in.q, ds, dz), initial(a, in.q, state);
    const Pair<A>& start = causal ? first : total;  // what the first query sees
    const LinearStates<A> states(a, kernels.lanes);
    const int64_t work = scratch_size(a, kernels.lanes), size = states.size;
    const Backward result{out.dq, out.dk, out.dv, initial.s.value_or(Tensor()),
                          initial.z.value_or(Tensor())};

    if (whole(each)) {
      each_head(each, [&](const Problem<Linear>& x, int64_t head, int64_t slot) {
        Arena<A> scratch = arena<A>(work + 2 * Arena<A>::cost(size));
        A *state = scratch.take(size), *dstate = scratch.take(size);
        states.read(state, start, slot);
        states.read(dstate, last, slot);
        kernels.queries(x.a, head, state, causal ? nullptr : dstate, scratch.next);
        kernels.gradients(x.kv, head, dstate, scratch.next);
        states.write(dstate, initial, slot);
      });
      return result;
    }
    int64_t slot = 0;  // of the first head
    for (const auto& [x, kv] : each) {
      const SegmentStates<A, LinearStates<A>> sums(x, states, work, in.q);
      const SegmentStates<A, LinearStates<A>> dsums(x, states, work, in.q);
      if (causal) {
        sums.sum(x, kernels.keys);
        sums.scan(
            false, [&](A* state, int64_t head) { states.read(state, first, slot + head); },
            [](A*, int64_t) {});
      }
      dsums.each([&, &x = x](int64_t task, A* scratch) {
        if (!causal) states.read(sums.of(task), total, slot + task / x.segments);
        states.clear(dsums.of(task));
        kernels.queries(x, task, sums.of(task), dsums.of(task), scratch);
      });
      dsums.scan(
          true, [&](A* state, int64_t head) { states.read(state, last, slot + head); },
          [&](A* state, int64_t head) { states.write(state, initial, slot + head); });
      dsums.run(kv, kernels.gradients);
      slot += x.b * x.h;
    }
    return result;
  });
}

// --- dense and packed -----------------------------------------------------------------------------

// Without `state` only what depends on the tokens is returned.
template <bool state>
std::conditional_t<state, Forward, Tensor> dense_forward(Tensor q, Tensor k, Tensor v,
                                                         std::optional<Tensor> mask,
                                                         std::optional<Tensor> s0,
                                                         std::optional<Tensor> z0, int64_t map,
                                                         bool causal, double eps) {
  constexpr const char* op = state ? "linear_fwd" : "linear_stateless_fwd";
  Linear a{};
  const Inputs in(op, a, q, k, v, mask, true, !causal);
  const Forward got = forward(op, {}, a, in, s0, z0, map, causal, eps, state);
  if constexpr (state)
    return got;
  else
    return std::get<0>(got);
}

Forward packed_forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                       std::optional<Tensor> s0, std::optional<Tensor> z0, Tensor cu_seqlens,
                       int64_t map, bool causal, double eps) {
  constexpr const char* op = "linear_packed_fwd";
  Linear a{};
  const Inputs in(op, a, q, k, v, mask, true);
  return forward(op, Ends(op, cu_seqlens, a.b, a.n), a, in, s0, z0, map, causal, eps, true);
}

template <bool state>
std::conditional_t<state, Backward, std::tuple<Tensor, Tensor, Tensor>> dense_backward(
    Tensor grad, std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor q, Tensor k, Tensor v,
    Tensor /* o */, Tensor s, Tensor z, std::optional<Tensor> mask, std::optional<Tensor> s0,
    std::optional<Tensor> z0, int64_t map, bool causal, double eps) {
  constexpr const char* op = state ? "linear_bwd" : "linear_stateless_bwd";
  Linear a{};
  const Inputs in(op, a, q, k, v, mask, true, !causal);
  const Backward got = backward(op, {}, a, in, grad, ds, dz, s, z, s0, z0, map, causal, eps, state);
  if constexpr (state)
    return got;
  else
    return {std::get<0>(got), std::get<1>(got), std::get<2>(got)};
}

Backward packed_backward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                         std::optional<Tensor> s0, std::optional<Tensor> z0, Tensor o, Tensor s,
                         Tensor z, std::optional<Tensor> grad, std::optional<Tensor> ds,
                         std::optional<Tensor> dz, Tensor cu_seqlens, int64_t map, bool causal,
                         double eps) {
  constexpr const char* op = "linear_packed_bwd";
  Linear a{};
  const Inputs in(op, a, q, k, v, mask, true);
  const Ends ends(op, cu_seqlens, a.b, a.n);
  if (ds.has_value() != dz.has_value()) ds = or_zeros(ds, s), dz = or_zeros(dz, z);
  Backward got = backward(op, ends, a, in, or_zeros(grad, o), ds, dz, s, z, s0, z0, map, causal,
                          eps, s0.has_value());
  if (!s0) std::get<3>(got) = std::get<4>(got) = nothing(in.q);
  return got;
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("linear_fwd", TORCH_BOX(&tab::dense_forward<true>));
  m.impl("linear_bwd", TORCH_BOX(&tab::dense_backward<true>));
  m.impl("linear_stateless_fwd", TORCH_BOX(&tab::dense_forward<false>));
  m.impl("linear_stateless_bwd", TORCH_BOX(&tab::dense_backward<false>));
}
STABLE_TORCH_LIBRARY_IMPL(tab_packed, CPU, m) {
  m.impl("linear_packed_fwd", TORCH_BOX(&tab::packed_forward));
  m.impl("linear_packed_bwd", TORCH_BOX(&tab::packed_backward));
}
