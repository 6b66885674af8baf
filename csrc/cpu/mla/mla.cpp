// tab::mla_fwd and tab::mla_bwd on the CPU: the fused form of multi-head latent attention.
//
//     K_h = c W_uk,hᵀ,  V_h = c W_uv,hᵀ,  S_h = scale·(q_n K_hᵀ + q_r k_rᵀ),  o_h = softmax(S_h) V_h
//     P = exp(S - lse),  Δ = Σ do·o - dlse,  dS = scale·P∘(do Vᵀ - Δ),  dq_n = dS K,  dq_r = dS k_r
//     dK = dSᵀq_n,  dV = Pᵀdo,  dc = Σ_h(dK W_uk + dV W_uv),  dk_r = Σ_h dSᵀq_r
//     dW_uk = Σ_b dKᵀc,  dW_uv = Σ_b dVᵀc
//
// tab::bent_mla_fwd and its likes bend the scores: s becomes c·tanh(s/c) - m_h·|i - j|.
//
// DeepSeek-V2 2024, eq. 9-19. K_h and V_h are expanded in scratch, one head at a time. For N = 64
// the products of a head cost N·R·(Dn+Dv) to expand and N²·(Dn+Dr+Dv) to attend; absorbing W_uk into
// q costs as much as expanding it and makes the scores R/Dn times dearer.
//
// A task is some batch entries, some heads and, when those are few, some queries. The sums over
// heads, queries (dc, dk_r) and batch (dW) are added up per task and then over the tasks in order.
// How the backward pass is cut depends on the shape alone: the same bits on any number of threads.

#include <algorithm>
#include <limits>
#include <vector>

#include "../core/packed.h"
#include "mla.h"

#define TAB_KERNEL "../mla/mla_kernel.h"
#include "../core/each_isa.h"
#include "mla_cut.h"

namespace tab {
namespace {

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

/// Queries whose scores are held at once: a strip stays in the L2. Causal, short ones leave out more of
/// the hidden keys.
int64_t rows_of(const Mla& a) {
  return std::clamp<int64_t>((int64_t(1) << 16) / a.n / 8 * 8, 8, a.causal ? 16 : 64);
}

/// A dense batch, or one sequence of a packed one, how it is cut, and where it stands among all.
struct Problem {
  Mla a;
  int64_t number;
  Cut cut;
  int64_t at = 0;  // its place in a buffer of sums
};

/// Those that have tokens. T is the type of the tensors.
template <class T, class F>
std::vector<Problem> problems(const Mla& a, const Ends& ends, const F& cut) {
  if (!ends.packed) return {{a, 0, cut(a, 1)}};
  int64_t count = 0;
  for (int64_t i = 0; i < ends.count(); ++i) count += ends.at[i] < ends.at[i + 1];
  std::vector<Problem> each;
  for (int64_t i = 0; i < ends.count(); ++i) {
    const int64_t from = ends.at[i], n = ends.at[i + 1] - from;
    if (n == 0) continue;
    Mla x = a;
    x.n = n, x.rows = rows_of(x);
    for (Rows* y : {&x.qn, &x.qr, &x.c, &x.kr, &x.o, &x.grad, &x.dqn, &x.dqr, &x.dc, &x.dkr})
      skip<T>(*y, from);
    if (x.mask != nullptr) x.mask += from;
    x.lse = static_cast<acc_t<T>*>(x.lse) + from;
    if (x.dlse != nullptr) x.dlse = static_cast<const acc_t<T>*>(x.dlse) + from;
    each.push_back({x, i, cut(x, count)});
  }
  return each;
}

/// The inputs of both passes, checked, pointed to by `a`, and kept alive.
struct Operands {
  Tensor qn, qr, c, kr, uk, uv;
  std::optional<Tensor> mask, slopes;
  Mla a{};

  Operands(const char* op, const Tensor& qn_, const Tensor& qr_, const Tensor& c_,
           const Tensor& kr_, const Tensor& uk_, const Tensor& uv_,
           const std::optional<Tensor>& mask_, double scale, bool causal,
           const std::optional<Tensor>& slopes_ = {}, double softcap = 0)
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
    STD_TORCH_CHECK(softcap >= 0, op, ": softcap ≥ 0, 0 for none");
    if (slopes_) {
      check_shape(op, "slopes", *slopes_, {a.h});
      check_dtype(op, "slopes", *slopes_, accumulator(qn));
    }
    slopes = contiguous(slopes_), a.slopes = slopes ? slopes->data_ptr() : nullptr;
    a.softcap = softcap;
    a.qn = Rows(qn), a.qr = Rows(qr), a.c = by_batch(c), a.kr = by_batch(kr);
    a.uk = by_head(uk), a.uv = by_head(uv);
    a.row = a.n, a.rows = rows_of(a);
  }
};

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Three forward(const char* op, Operands& in, const Ends& ends) {
  Mla& a = in.a;
  const int64_t batches = ends.packed ? ends.count() : a.b, heads = a.b * a.h;
  const Tensor o = token_major(in.qn, a.b, a.h, a.n, a.dv);
  const ScalarType acc = accumulator(in.qn);
  const Tensor lse = torch::stable::new_empty(in.qn, {a.b, a.h, a.n}, acc);
  const Tensor peaks = torch::stable::new_empty(in.qn, {batches, a.h}, acc);
  a.o = Rows(o), a.lse = lse.data_ptr();

  return dispatch(op, in.qn, [&]<class T>() -> Three {
    using A = acc_t<T>;
    const MlaKernels& kernels = TAB_SELECT(mla_kernels<T>);
    const int64_t rp = up(a.r, kernels.lanes), dvp = up(a.dv, kernels.lanes);
    const Tensor weights = torch::stable::new_empty(in.qn, {a.h, a.dn * rp + a.r * dvp}, acc);
    a.weights = weights.data_ptr();
    parallel(a.h, [&](int64_t head) { kernels.pack_forward(a, head, arena<A>(a.dv * rp).next); });
    std::vector<Problem> each = problems<T>(a, ends, cut_forward);
    std::vector<std::pair<const Problem*, int64_t>> tasks;
    int64_t work = 0, size = 0;
    for (Problem& x : each) {
      work = std::max(work, kernels.forward_scratch(x.a));
      x.at = size, size += x.cut.queries.parts * heads;
      for (int64_t task = 0; task < x.cut.tasks(); ++task) tasks.push_back({&x, task});
    }
    const Tensor every = torch::stable::new_empty(in.qn, {size}, acc);
    A *highest = static_cast<A*>(peaks.data_ptr()), *parts = static_cast<A*>(every.data_ptr());
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      const auto& [x, task] = tasks[i];
      kernels.forward(x->a, x->cut[task], parts + x->at + x->cut.query_part(task) * heads,
                      arena<A>(work).next);
    });
    if (ends.packed)  // of no tokens
      std::fill_n(highest, batches * a.h, -std::numeric_limits<A>::infinity());
    for (const Problem& x : each)
      for (int64_t i = 0; i < heads; ++i) {
        A& top = highest[x.number * heads + i] = parts[x.at + i];
        for (int64_t part = 1; part < x.cut.queries.parts; ++part)
          if (const A other = parts[x.at + part * heads + i]; other != other || other > top)
            top = other;
      }
    return {o, lse, peaks};
  });
}

/// What one task does, one after the other.
struct Job {
  const Problem* of;
  MlaTask task;
  MlaSums sums;
};

Six backward(const char* op, Operands& in, const Ends& ends, Tensor grad,
             std::optional<Tensor> dlse, Tensor o, Tensor lse) {
  Mla& a = in.a;
  const ScalarType acc = accumulator(in.qn);
  check_output(op, "do", grad, in.qn, a.dv);
  check_output(op, "o", o, in.qn, a.dv);
  check_lse(op, "lse", lse, in.qn);
  if (dlse) check_lse(op, "dlse", *dlse, in.qn);
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

  return dispatch(op, in.qn, [&]<class T>() -> Six {
    using A = acc_t<T>;
    const MlaKernels& kernels = TAB_SELECT(mla_kernels<T>);
    const int64_t rp = up(a.r, kernels.lanes), drp = up(a.dr, kernels.lanes);
    const int64_t rows = up(a.dv, kernels.lanes) + a.dn;  // of the packed weights
    const Tensor weights = torch::stable::new_empty(in.qn, {a.h, rows, rp}, acc);
    a.weights = weights.data_ptr();
    parallel(a.h, [&](int64_t head) { kernels.pack_backward(a, head, nullptr); });

    // Many sequences are undivided, and neighbours share a sum of weights, of which there are 64.
    constexpr int64_t many = 16, groups = 64;
    const int64_t weight = a.h * rows * rp;
    std::vector<Problem> each = problems<T>(a, ends, [&](const Mla& x, int64_t count) {
      return count >= many ? undivided(x) : cut_backward(x, x.b * x.n * (rp + drp), weight, count);
    });
    const int64_t count = static_cast<int64_t>(each.size()), shared = std::min(count, groups);
    const bool sharing = count >= many;
    const auto latents = [](const Problem& x) { return x.cut.heads.parts * x.cut.queries.parts; };
    const auto latent = [&](const Problem& x) { return x.a.b * x.a.n * (rp + drp); };
    int64_t work = 0, latent_size = 0, weight_sums = sharing ? shared : 0;
    for (Problem& x : each) {
      work = std::max(work, kernels.backward_scratch(x.a)), x.at = latent_size;
      if (latents(x) > 1) latent_size += latents(x) * latent(x);
      if (!sharing) weight_sums += x.cut.batch.parts * x.cut.queries.parts;
    }
    const Tensor latent_buffer = torch::stable::new_empty(in.qn, {latent_size}, acc);
    const Tensor weight_buffer = torch::stable::new_empty(in.qn, {weight_sums * weight}, acc);
    A* of_latents = static_cast<A*>(latent_buffer.data_ptr());
    A* of_weights = static_cast<A*>(weight_buffer.data_ptr());
    std::vector<std::vector<Job>> tasks(sharing ? shared : 0);
    int64_t first = 0;  // the sums of weights of the problems before
    for (int64_t i = 0; i < count; ++i) {
      const Problem& x = each[i];
      if (sharing) {
        std::vector<Job>& jobs = tasks[i * shared / count];
        MlaTask task = x.cut[0];
        task.add = !jobs.empty();
        jobs.push_back({&x, task, {nullptr, of_weights + i * shared / count * weight}});
        continue;
      }
      for (int64_t t = 0; t < x.cut.tasks(); ++t) {
        const int64_t q = x.cut.query_part(t), parts = x.cut.queries.parts;
        A* sums = of_latents + x.at + (x.cut.head_part(t) * parts + q) * latent(x);
        tasks.push_back({{&x,
                          x.cut[t],
                          {latents(x) == 1 ? nullptr : sums,
                           of_weights + (first + x.cut.batch_part(t) * parts + q) * weight}}});
      }
      first += x.cut.batch.parts * x.cut.queries.parts;
    }
    parallel(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      for (const Job& job : tasks[i])
        kernels.backward(job.of->a, job.task, job.sums, arena<A>(work).next);
    });
    for (const Problem& x : each)
      if (latents(x) > 1)
        parallel(x.a.b * x.a.n, [&](int64_t token) {
          kernels.finish_latent(x.a, token, of_latents + x.at, latents(x), arena<A>(rp + drp).next);
        });
    parallel(a.h, [&](int64_t head) {
      kernels.finish_weights(a, head, of_weights, weight_sums, arena<A>(rp).next, by_head(duk),
                             by_head(duv));
    });
    return {dqn, dqr, dc, dkr, duk, duv};
  });
}

// --- dense and packed, and those whose scores are bent --------------------------------------------

Three dense_forward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
                    std::optional<Tensor> mask, double scale, bool causal) {
  Operands in("mla_fwd", qn, qr, c, kr, uk, uv, mask, scale, causal);
  return forward("mla_fwd", in, {});
}

Three bent_forward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
                   std::optional<Tensor> mask, std::optional<Tensor> slopes, double scale,
                   bool causal, double softcap) {
  constexpr const char* op = "bent_mla_fwd";
  Operands in(op, qn, qr, c, kr, uk, uv, mask, scale, causal, slopes, softcap);
  return forward(op, in, {});
}

Three packed_forward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
                     std::optional<Tensor> mask, Tensor cu_seqlens, double scale, bool causal) {
  constexpr const char* op = "mla_packed_fwd";
  Operands in(op, qn, qr, c, kr, uk, uv, mask, scale, causal);
  return forward(op, in, Ends(op, cu_seqlens, in.a.b, in.a.n));
}

Three bent_packed_forward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
                          std::optional<Tensor> mask, std::optional<Tensor> slopes,
                          Tensor cu_seqlens, double scale, bool causal, double softcap) {
  constexpr const char* op = "bent_mla_packed_fwd";
  Operands in(op, qn, qr, c, kr, uk, uv, mask, scale, causal, slopes, softcap);
  return forward(op, in, Ends(op, cu_seqlens, in.a.b, in.a.n));
}

Six dense_backward(Tensor grad, std::optional<Tensor> dlse, Tensor qn, Tensor qr, Tensor c,
                   Tensor kr, Tensor uk, Tensor uv, Tensor o, Tensor lse,
                   std::optional<Tensor> mask, double scale, bool causal) {
  Operands in("mla_bwd", qn, qr, c, kr, uk, uv, mask, scale, causal);
  return backward("mla_bwd", in, {}, grad, dlse, o, lse);
}

Six bent_backward(Tensor grad, std::optional<Tensor> dlse, Tensor qn, Tensor qr, Tensor c,
                  Tensor kr, Tensor uk, Tensor uv, Tensor o, Tensor lse, std::optional<Tensor> mask,
                  std::optional<Tensor> slopes, double scale, bool causal, double softcap) {
  constexpr const char* op = "bent_mla_bwd";
  Operands in(op, qn, qr, c, kr, uk, uv, mask, scale, causal, slopes, softcap);
  return backward(op, in, {}, grad, dlse, o, lse);
}

Six packed_backward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
                    std::optional<Tensor> mask, Tensor o, Tensor lse, Tensor /* max_logits */,
                    std::optional<Tensor> grad, std::optional<Tensor> dlse, Tensor cu_seqlens,
                    double scale, bool causal) {
  constexpr const char* op = "mla_packed_bwd";
  Operands in(op, qn, qr, c, kr, uk, uv, mask, scale, causal);
  const Ends ends(op, cu_seqlens, in.a.b, in.a.n);
  return backward(op, in, ends, or_zeros(grad, o), dlse, o, lse);
}

Six bent_packed_backward(Tensor qn, Tensor qr, Tensor c, Tensor kr, Tensor uk, Tensor uv,
                         std::optional<Tensor> mask, std::optional<Tensor> slopes, Tensor o,
                         Tensor lse, Tensor /* max_logits */, std::optional<Tensor> grad,
                         std::optional<Tensor> dlse, Tensor cu_seqlens, double scale, bool causal,
                         double softcap) {
  constexpr const char* op = "bent_mla_packed_bwd";
  Operands in(op, qn, qr, c, kr, uk, uv, mask, scale, causal, slopes, softcap);
  const Ends ends(op, cu_seqlens, in.a.b, in.a.n);
  return backward(op, in, ends, or_zeros(grad, o), dlse, o, lse);
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("mla_fwd", TORCH_BOX(&tab::dense_forward));
  m.impl("mla_bwd", TORCH_BOX(&tab::dense_backward));
  m.impl("bent_mla_fwd", TORCH_BOX(&tab::bent_forward));
  m.impl("bent_mla_bwd", TORCH_BOX(&tab::bent_backward));
}
STABLE_TORCH_LIBRARY_IMPL(tab_packed, CPU, m) {
  m.impl("mla_packed_fwd", TORCH_BOX(&tab::packed_forward));
  m.impl("mla_packed_bwd", TORCH_BOX(&tab::packed_backward));
  m.impl("bent_mla_packed_fwd", TORCH_BOX(&tab::bent_packed_forward));
  m.impl("bent_mla_packed_bwd", TORCH_BOX(&tab::bent_packed_backward));
}
