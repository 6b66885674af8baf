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
// Work is cut into (b, h) and, when there are too few of those for the threads, into segments of
// the sequence: their states are summed first, then every segment runs on its own.
//
// The order φ(q)(φ(k)ᵀv) is taken at every N: S must be returned, so the quadratic order could
// win only below N = D/2.

#include "linear.h"

#define TAB_KERNEL "../linear/linear_kernel.h"
#include "../core/each_isa.h"

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

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> mask,
                                           std::optional<Tensor> s0, std::optional<Tensor> z0,
                                           int64_t map, bool causal, double eps) {
  Linear a = prepare("linear_fwd", q, k, v, mask, s0, z0, map, causal, eps);
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  if (mask) mask = torch::stable::contiguous(*mask);
  Tensor o = token_major(v, a.b, a.h, a.n, a.e);
  a.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.o = Rows(o);
  a.stream = large(o);

  return dispatch("linear_fwd", q, [&]<class T>() -> std::tuple<Tensor, Tensor, Tensor> {
    using A = acc_t<T>;
    const LinearKernels& kernels = kernels_for<T>(a);
    const Pair<A> first("linear_fwd", a, q, s0, z0), last(a, q);
    const States<A> states(a, kernels.lanes);
    const int64_t heads = a.b * a.h, work = scratch_size(a, kernels.lanes);
    const int64_t last_slot = causal ? a.segments - 1 : 0;

    if (a.segments == 1) {
      parallel(heads, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + Arena<A>::cost(states.size));
        A* state = scratch.take(states.size);
        states.set(state, first.sp, first.zp, head);
        if (!causal) kernels.keys(a, head, state, scratch.next);
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
    Tensor /* o */, Tensor s, Tensor z, std::optional<Tensor> mask, std::optional<Tensor> s0,
    std::optional<Tensor> z0, int64_t map, bool causal, double eps) {
  Linear a = prepare("linear_bwd", q, k, v, mask, s0, z0, map, causal, eps);
  check_shape("linear_bwd", "do", grad, {a.b, a.h, a.n, a.e});
  check_dtype("linear_bwd", "do", grad, q.scalar_type());
  q = unit_last(q), k = unit_last(k), v = unit_last(v), grad = unit_last(grad);
  if (mask) mask = torch::stable::contiguous(*mask);
  Tensor dq = token_major(q, a.b, a.h, a.n, a.d), dk = token_major(k, a.b, a.h, a.n, a.d);
  Tensor dv = token_major(v, a.b, a.h, a.n, a.e);
  a.mask = mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr;
  a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.grad = Rows(grad);
  a.dq = Rows(dq), a.dk = Rows(dk), a.dv = Rows(dv);
  a.stream = large(dq);
  std::optional<Tensor> notes;
  if (causal) {
    notes = torch::stable::new_empty(q, {a.b, a.h, 2, a.n}, accumulator(q));
    a.notes = notes->data_ptr();
  }
  using Result = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

  return dispatch("linear_bwd", q, [&]<class T>() -> Result {
    using A = acc_t<T>;
    const LinearKernels& kernels = kernels_for<T>(a);
    const Pair<A> first("linear_bwd", a, q, s0, z0), total("linear_bwd", a, q, s, z);
    const Pair<A> last("linear_bwd", a, q, ds, dz), out(a, q);
    const Pair<A>& start = causal ? first : total;  // what the first query sees
    const States<A> states(a, kernels.lanes);
    const int64_t heads = a.b * a.h, work = scratch_size(a, kernels.lanes), size = states.size;

    if (a.segments == 1) {
      parallel(heads, [&](int64_t head) {
        Arena<A> scratch = arena<A>(work + 2 * Arena<A>::cost(size));
        A *state = scratch.take(size), *dstate = scratch.take(size);
        states.set(state, start.sp, start.zp, head);
        states.set(dstate, last.sp, last.zp, head);
        kernels.queries(a, head, state, causal ? nullptr : dstate, scratch.next);
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
    if (causal) {
      parallel(heads * a.segments, [&](int64_t task) {
        states.clear(all + task * size);
        kernels.keys(a, task, all + task * size, arena<A>(work).next);
      });
      parallel(heads, [&](int64_t head) {
        states.scan(all + head * a.segments * size, first.sp, first.zp, head, false,
                    arena<A>(size).next);
      });
    }
    parallel(heads * a.segments, [&](int64_t task) {
      A* state = all + task * size;
      if (!causal) states.set(state, total.sp, total.zp, task / a.segments);
      states.clear(dall + task * size);
      kernels.queries(a, task, state, dall + task * size, arena<A>(work).next);
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
