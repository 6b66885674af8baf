// tab::mla_fwd and tab::mla_bwd on the CPU: the fused form of multi-head latent attention.
//
//     K_h = c W_uk,hᵀ,  V_h = c W_uv,hᵀ,  S_h = scale·(q_n K_hᵀ + q_r k_rᵀ),  o_h = softmax(S_h) V_h
//     P = exp(S - lse),  Δ = Σ do·o - dlse,  dS = scale·P∘(do Vᵀ - Δ),  dq_n = dS K,  dq_r = dS k_r
//     dK = dSᵀq_n,  dV = Pᵀdo,  dc = Σ_h(dK W_uk + dV W_uv),  dk_r = Σ_h dSᵀq_r
//     dW_uk = Σ_b dKᵀc,  dW_uv = Σ_b dVᵀc
//
// DeepSeek-V2 2024, eq. 9-19. K_h and V_h are expanded in scratch, one head at a time. For N = 64
// the products of a head cost N·R·(Dn+Dv) to expand and N²·(Dn+Dr+Dv) to attend; absorbing W_uk into
// q costs as much as expanding it and makes the scores R/Dn times dearer.
//
// A task is some batch entries, some heads and, when those are few, some queries. The sums over
// heads, queries (dc, dk_r) and batch (dW) are added up per task and then over the tasks in order.
// How the backward pass is cut depends on the shape alone: the same bits on any number of threads.

#include <algorithm>

#include "../../common.h"
#include "mla.h"

#define TAB_KERNEL "../mla/mla_kernel.h"
#include "../core/each_isa.h"

namespace tab {
namespace {

/// How many parts of the batch, of the heads and of the queries; `each` is the size of one part.
struct Cut {
  struct Axis {
    int64_t size, each, parts;
    Axis(int64_t size, int64_t parts, int64_t whole = 1)
        : size(size),
          each(ceiling(ceiling(size, parts), whole) * whole),
          parts(ceiling(size, each)) {}
    int64_t from(int64_t part) const { return part * each; }
    int64_t to(int64_t part) const { return std::min(size, (part + 1) * each); }
  };
  Axis batch, heads, queries;

  int64_t tasks() const { return batch.parts * heads.parts * queries.parts; }
  int64_t query_part(int64_t task) const { return task % queries.parts; }
  int64_t head_part(int64_t task) const { return task / queries.parts % heads.parts; }
  int64_t batch_part(int64_t task) const { return task / queries.parts / heads.parts; }
  MlaTask operator[](int64_t task) const {
    const int64_t b = batch_part(task), h = head_part(task), q = query_part(task);
    return {batch.from(b), batch.to(b), heads.from(h), heads.to(h), queries.from(q), queries.to(q)};
  }
};

/// Enough tasks for the threads: first by batch, then by heads, then by blocks of queries.
Cut cut_forward(const Mla& a) {
  const int64_t enough = a.b % threads() == 0 ? a.b : 4 * threads();
  const Cut::Axis batch(a.b, a.b), heads(a.h, std::min(a.h, ceiling(enough, a.b)));
  const int64_t left = ceiling(enough, batch.parts * heads.parts);
  return {batch, heads, Cut::Axis(a.n, std::min(left, ceiling(a.n, 64)), a.rows)};
}

/// At most 64 tasks, whose sums take at most 64 MiB (or four times the smallest possible).
Cut cut_backward(const Mla& a, int64_t latent, int64_t weights) {
  constexpr int64_t enough = 64, room = int64_t(1) << 24;
  const int64_t latents = std::max<int64_t>(4, room / latent);
  const int64_t weight_sums = std::max<int64_t>(4, room / weights);
  const Cut::Axis batch(a.b, std::min({a.b, enough, weight_sums}));
  const Cut::Axis heads(a.h, std::min({a.h, ceiling(enough, batch.parts), latents}));
  const int64_t left = std::min({enough / (batch.parts * heads.parts), latents / heads.parts,
                                 weight_sums / batch.parts, ceiling(a.n, 128)});
  return {batch, heads, Cut::Axis(a.n, std::max<int64_t>(1, left), a.rows)};
}

/// Where the rows of a (B, N, ·) tensor, or of the (H, ·, R) weights, lie.
Rows by_batch(const Tensor& x) {
  Rows rows;
  rows.data = x.data_ptr(), rows.b = x.stride(0), rows.n = x.stride(1);
  return rows;
}
Rows by_head(const Tensor& x) {
  Rows rows;
  rows.data = x.data_ptr(), rows.h = x.stride(0), rows.n = x.stride(1);
  return rows;
}

/// The inputs of both passes, checked, pointed to by `a`, and kept alive.
struct Inputs {
  Tensor qn, qr, c, kr, uk, uv;
  std::optional<Tensor> mask;
  Mla a{};

  Inputs(const char* op, const Tensor& qn_, const Tensor& qr_, const Tensor& c_, const Tensor& kr_,
         const Tensor& uk_, const Tensor& uv_, const std::optional<Tensor>& mask_, double scale,
         bool causal)
      : qn(unit_last(qn_)),
        qr(unit_last(qr_)),
        c(unit_last(c_)),
        kr(unit_last(kr_)),
        uk(unit_last(uk_)),
        uv(unit_last(uv_)) {
    STD_TORCH_CHECK(qn.dim() == 4 && qr.dim() == 4 && c.dim() == 3 && uv.dim() == 3, op,
                    ": q is (B, H, N, D), c_kv (B, N, R), w_uv (H, Dv, R)");
    a.b = qn.size(0), a.h = qn.size(1), a.n = qn.size(2), a.dn = qn.size(3);
    a.dr = qr.size(3), a.r = c.size(2), a.dv = uv.size(1), a.scale = scale, a.causal = causal;
    STD_TORCH_CHECK(a.b * a.h * a.n * a.dn * a.r * a.dv > 0, op, ": an empty dimension");
    check_shape(op, "q_rope", qr, {a.b, a.h, a.n, a.dr});
    check_shape(op, "c_kv", c, {a.b, a.n, a.r});
    check_shape(op, "k_rope", kr, {a.b, a.n, a.dr});
    check_shape(op, "w_uk", uk, {a.h, a.dn, a.r});
    check_shape(op, "w_uv", uv, {a.h, a.dv, a.r});
    for (const Tensor* x : {&qr, &c, &kr, &uk, &uv})
      check_dtype(op, "an input", *x, qn.scalar_type());
    check_mask(op, mask_, a.b, a.n);
    mask = contiguous(mask_), a.mask = mask_bytes(mask);
    a.qn = Rows(qn), a.qr = Rows(qr), a.c = by_batch(c), a.kr = by_batch(kr);
    a.uk = by_head(uk), a.uv = by_head(uv);
    // A strip of scores stays in the L2. Causal, short ones leave out more of the hidden keys.
    a.rows = std::clamp<int64_t>((int64_t(1) << 16) / a.n / 8 * 8, 8, causal ? 16 : 64);
  }
};

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Three forward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
              std::optional<Tensor> mask, double scale, bool causal) {
  Inputs in("mla_fwd", qn, qr, c, kr, uk, uv, mask, scale, causal);
  Mla& a = in.a;
  const Tensor o = token_major(in.qn, a.b, a.h, a.n, a.dv);
  const ScalarType acc = accumulator(in.qn);
  const Tensor lse = torch::stable::new_empty(in.qn, {a.b, a.h, a.n}, acc);
  const Tensor peaks = torch::stable::new_empty(in.qn, {a.b, a.h}, acc);
  a.o = Rows(o), a.lse = lse.data_ptr();

  return dispatch("mla_fwd", in.qn, [&]<class T>() -> Three {
    using A = acc_t<T>;
    const MlaKernels& kernels = TAB_SELECT(mla_kernels<T>);
    const int64_t rp = up(a.r, kernels.lanes), dvp = up(a.dv, kernels.lanes);
    const Tensor weights = torch::stable::new_empty(in.qn, {a.h, a.dn * rp + a.r * dvp}, acc);
    a.weights = weights.data_ptr();
    parallel(a.h, [&](int64_t head) { kernels.pack_forward(a, head, arena<A>(a.dv * rp).next); });
    const Cut cut = cut_forward(a);
    const int64_t work = kernels.forward_scratch(a), parts = cut.queries.parts, heads = a.b * a.h;
    const Tensor every = parts == 1 ? peaks : torch::stable::new_empty(in.qn, {parts, heads}, acc);
    A *highest = static_cast<A*>(peaks.data_ptr()), *each = static_cast<A*>(every.data_ptr());
    parallel(cut.tasks(), [&](int64_t task) {
      kernels.forward(a, cut[task], each + cut.query_part(task) * heads, arena<A>(work).next);
    });
    for (int64_t i = 0; parts > 1 && i < heads; ++i) {
      highest[i] = each[i];
      for (int64_t part = 1; part < parts; ++part)
        if (const A other = each[part * heads + i]; other != other || other > highest[i])
          highest[i] = other;
    }
    return {o, lse, peaks};
  });
}

Six backward(Tensor grad, std::optional<Tensor> dlse, Tensor qn, Tensor qr, Tensor c, Tensor kr,
             Tensor uk, Tensor uv, Tensor o, Tensor lse, std::optional<Tensor> mask, double scale,
             bool causal) {
  Inputs in("mla_bwd", qn, qr, c, kr, uk, uv, mask, scale, causal);
  Mla& a = in.a;
  const ScalarType acc = accumulator(in.qn);
  check_output("mla_bwd", "do", grad, qn, a.dv);
  check_output("mla_bwd", "o", o, qn, a.dv);
  check_lse("mla_bwd", "lse", lse, qn);
  if (dlse) check_lse("mla_bwd", "dlse", *dlse, qn);
  grad = unit_last(grad), o = unit_last(o), lse = torch::stable::contiguous(lse);
  dlse = contiguous(dlse);
  const Tensor dqn = token_major(in.qn, a.b, a.h, a.n, a.dn);
  const Tensor dqr = token_major(in.qn, a.b, a.h, a.n, a.dr);
  const Tensor dc = empty(in.qn, {a.b, a.n, a.r});
  const Tensor dkr = torch::stable::new_empty(in.qn, {a.b, a.n, a.dr});
  const Tensor duk = torch::stable::new_empty(in.qn, {a.h, a.dn, a.r});
  const Tensor duv = torch::stable::new_empty(in.qn, {a.h, a.dv, a.r});
  a.grad = Rows(grad), a.o = Rows(o), a.dqn = Rows(dqn), a.dqr = Rows(dqr);
  a.dc = by_batch(dc), a.dkr = by_batch(dkr);
  a.lse = lse.data_ptr(), a.dlse = dlse ? dlse->data_ptr() : nullptr;

  return dispatch("mla_bwd", in.qn, [&]<class T>() -> Six {
    using A = acc_t<T>;
    const MlaKernels& kernels = TAB_SELECT(mla_kernels<T>);
    const int64_t rp = up(a.r, kernels.lanes), drp = up(a.dr, kernels.lanes);
    const int64_t rows = up(a.dv, kernels.lanes) + a.dn;  // of the packed weights
    const Tensor weights = torch::stable::new_empty(in.qn, {a.h, rows, rp}, acc);
    a.weights = weights.data_ptr();
    parallel(a.h, [&](int64_t head) { kernels.pack_backward(a, head, nullptr); });

    const int64_t latent = a.b * a.n * (rp + drp), weight = a.h * rows * rp;
    const Cut cut = cut_backward(a, latent, weight);
    const int64_t latents = cut.heads.parts * cut.queries.parts;
    const int64_t weight_sums = cut.batch.parts * cut.queries.parts;
    const bool straight = latents == 1;
    const Tensor latent_buffer =
        torch::stable::new_empty(in.qn, {straight ? 0 : latents * latent}, acc);
    const Tensor weight_buffer = torch::stable::new_empty(in.qn, {weight_sums * weight}, acc);
    A* of_latents = straight ? nullptr : static_cast<A*>(latent_buffer.data_ptr());
    A* of_weights = static_cast<A*>(weight_buffer.data_ptr());
    const int64_t work = kernels.backward_scratch(a);
    parallel(cut.tasks(), [&](int64_t task) {
      const int64_t q = cut.query_part(task);
      const int64_t i = cut.head_part(task) * cut.queries.parts + q;
      const int64_t j = cut.batch_part(task) * cut.queries.parts + q;
      const MlaSums sums{straight ? nullptr : of_latents + i * latent, of_weights + j * weight};
      kernels.backward(a, cut[task], sums, arena<A>(work).next);
    });
    if (!straight)
      parallel(a.b * a.n, [&](int64_t token) {
        kernels.finish_latent(a, token, of_latents, latents, arena<A>(rp + drp).next);
      });
    parallel(a.h, [&](int64_t head) {
      kernels.finish_weights(a, head, of_weights, weight_sums, arena<A>(rp).next, by_head(duk),
                             by_head(duv));
    });
    return {dqn, dqr, dc, dkr, duk, duv};
  });
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("mla_fwd", TORCH_BOX(&tab::forward));
  m.impl("mla_bwd", TORCH_BOX(&tab::backward));
}
