// Multi-head latent attention, the fused backward pass (formulas: mla.cpp). Included once per
// instruction set, after mla_kernel.h.
//
// The tiles of a head are [Vᵀ; Kᵀ; k_rᵀ] (Dvp+Dn+Dr, 64): one product of [W_uv; W_uk] and cᵀ. Its
// gradients stand side by side in G (N, Dvp+Dkp) = [dV | dK | dk_r], so that dc = G [W_uv; W_uk] and
// [dW_uv; dW_uk] = Gᵀ c are one product each. W_uk and k_r carry scale·log₂e, dS the factor ln 2;
// with a cap scale/c and c·(1 - tanh²).

namespace tab::TAB_ISA {

/// Packed weights of a head: W_uv (Dvp, Rp), its padding zero, then scaled W_uk (Dn, Rp).
template <class T>
static void pack_backward(const Mla& a, int64_t head, void*) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  A* w = static_cast<A*>(a.weights) + head * (s.dvp + a.dn) * s.rp;
  load_rows<T>(row<T>(a.uv, 0, head, 0), a.uv.n, a.dv, a.r, w);
  clear(w + a.dv * s.rp, (s.dvp - a.dv) * s.rp);
  load_rows<T>(row<T>(a.uk, 0, head, 0), a.uk.n, a.dn, a.r, w + s.dvp * s.rp);
  multiply(w + s.dvp * s.rp, key_scale<A>(a), a.dn * s.rp);
}

template <class A>
struct MlaBackward : Pieces<A> {
  int64_t c, ct, kt, turn, k, bias, q, g, o, s, ds, steep, dq, sums, dc, dkr;

  TAB_INLINE MlaBackward of(const Mla& a) {
    const auto s = MlaSizes<A>::of(a);
    const int64_t n = s.tiles * KEYS;
    MlaBackward p{};
    p.c = Pieces<A>::take(p, n * s.rp);
    p.ct = Pieces<A>::take(p, n * a.r);
    p.kt = Pieces<A>::take(p, n * (s.dvp + s.dk));
    p.turn = Pieces<A>::take(p, KEYS * s.drp);
    p.k = Pieces<A>::take(p, n * s.dkp);
    p.bias = Pieces<A>::take(p, s.np);
    p.q = Pieces<A>::take(p, a.rows * s.dkp + W<A>);
    p.g = Pieces<A>::take(p, a.rows * s.dvp);
    p.o = Pieces<A>::take(p, s.dvp);
    p.s = Pieces<A>::take(p, a.rows * s.strip);
    p.ds = Pieces<A>::take(p, a.rows * s.strip);
    p.steep = Pieces<A>::take(p, a.softcap > 0 ? a.rows * s.strip : 0);
    p.dq = Pieces<A>::take(p, a.rows * s.dkp + W<A>);
    p.sums = Pieces<A>::take(p, n * (s.dvp + s.dkp) + W<A>);
    p.dc = Pieces<A>::take(p, n * s.rp);
    p.dkr = Pieces<A>::take(p, n * s.drp);
    return p;
  }
};

/// p = 2^(s - lse) and ds = ln 2·p∘(ds - Δ), in place.
template <bool masked, class A>
static void differentiate(const Mla& a, int64_t i0, int64_t count, int64_t columns, const A* bias,
                          const A* lse, const A* delta, A* s, A* ds, int64_t ld) {
  for (int64_t i = 0; i < count; ++i, s += ld, ds += ld) {
    const int64_t seen = seen_columns<A>(a, i0 + i, columns);
    for (int64_t j = 0; j < seen; j += W<A>) {
      const Vec<A> x = hide<masked>(load(s + j), bias, a.causal, i0 + i, j);
      const Vec<A> p = exp2<A>(x - lse[i]);
      Vec<A> slope = p * LN2<A> * (load(ds + j) - delta[i]);
      if (masked) slope = x == splat<A>(-A(__builtin_inf())) ? Vec<A>{} : slope;  // not 0·NaN
      store(s + j, p);
      store(ds + j, slope);
    }
    clear(s + seen, columns - seen);
    clear(ds + seen, columns - seen);
  }
}

/// ds∘steep in place; a pair that does not see each other, 0, stays 0.
template <class A>
static void flatten(const Mla& a, int64_t i0, int64_t count, int64_t columns, const A* steep, A* ds,
                    int64_t ld) {
  for (int64_t i = 0; i < count; ++i, steep += ld, ds += ld)
    for (int64_t j = 0; j < seen_columns<A>(a, i0 + i, columns); j += W<A>) {
      const Vec<A> x = load(ds + j);
      store(ds + j, x == 0 ? x : x * load(steep + j));
    }
}

/// dO of the queries i0 …, Δ = Σ do·o - dlse, and lse·log₂e, +∞ in a row that sees no key. So is a
/// masked token whose results have no cotangent, with q = 0: whatever its q holds, nobody learns it.
template <class T>
static void load_cotangents(const Mla& a, int64_t b, int64_t h, int64_t i0, int64_t count,
                            acc_t<T>* q, acc_t<T>* g, acc_t<T>* o, acc_t<T>* delta, acc_t<T>* lse) {
  using A = acc_t<T>;
  const int64_t dkp = padded<A>(a.dn + a.dr), dvp = padded<A>(a.dv),
                first = (b * a.h + h) * a.row + i0;
  const A *l = static_cast<const A*>(a.lse) + first, *dl = static_cast<const A*>(a.dlse);
  for (int64_t i = 0; i < count; ++i, g += dvp) {
    prefetch_row(row<T>(a.grad, b, h, i0 + i + AHEAD), a.dv);
    prefetch_row(row<T>(a.o, b, h, i0 + i + AHEAD), a.dv);
    load_row(row<T>(a.grad, b, h, i0 + i), a.dv, g);
    load_row(row<T>(a.o, b, h, i0 + i), a.dv, o);
    Vec<A> products{};
    for (int64_t j = 0; j < dvp; j += W<A>) products += load(g + j) * load(o + j);
    delta[i] = sum<A>(products) - (dl == nullptr ? A(0) : dl[first + i]);
    lse[i] = l[i] == A(-__builtin_inf()) ? A(__builtin_inf()) : l[i] * LOG2E<A>;
    if (a.mask == nullptr || a.mask[b * a.n + i0 + i] || (dl != nullptr && dl[first + i] != 0) ||
        !all_zero(row<T>(a.grad, b, h, i0 + i), a.dv))
      continue;
    delta[i] = 0, lse[i] = A(__builtin_inf());
    clear(q + i * dkp, dkp);
  }
}

/// All gradients that the queries of one task give. dq is whole, the rest are sums of the task.
template <class T>
static void backward(const Mla& a, const MlaTask& task, const MlaSums& sums, void* scratch) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  const auto at = MlaBackward<A>::of(a);
  A* x = static_cast<A*>(scratch);
  A *c = x + at.c, *ct = x + at.ct, *kt = x + at.kt, *k = x + at.k, *q = x + at.q, *g = x + at.g;
  A *strip = x + at.s, *ds = x + at.ds, *dq = x + at.dq, *grads = x + at.sums, *dc = x + at.dc;
  A* steep = a.softcap > 0 ? x + at.steep : nullptr;
  A *dkr = x + at.dkr, *bias = a.mask != nullptr || s.np != a.n ? x + at.bias : nullptr;
  A delta[KEYS], lse[KEYS];
  const int64_t tall = s.dvp + s.dk, ld = s.dvp + s.dkp, high = s.dvp + a.dn;
  const int64_t seen = a.causal ? task.q1 : a.n;  // keys that any query of the task sees
  for (int64_t b = task.b0; b < task.b1; ++b) {
    load_latents<T>(a, b, c, ct, kt, tall, x + at.turn);
    if (bias != nullptr) load_bias(a, b, bias);
    clear(dc, a.n * s.rp);
    clear(dkr, a.n * s.drp);
    for (int64_t h = task.h0; h < task.h1; ++h) {
      const A* w = static_cast<const A*>(a.weights) + h * high * s.rp;
      for (int64_t t = 0; t < seen; t += KEYS) {
        const int64_t count = least(KEYS, a.n - t);
        A* tile = kt + t * tall;
        gemm(high, padded<A>(count), a.r, w, s.rp, ct + t * a.r, KEYS, tile, KEYS, false);
        transpose(s.dk, padded<A>(count), tile + s.dvp * KEYS, KEYS, k + t * s.dkp, s.dkp);
      }
      // From the last queries to the first: the last ones see every key, so they start the sums.
      const int64_t blocks = ceiling(task.q1 - task.q0, a.rows);
      for (int64_t block = blocks - 1; block >= 0; --block) {
        const int64_t i0 = task.q0 + block * a.rows, count = least(a.rows, task.q1 - i0);
        const int64_t columns = a.causal ? least(s.np, padded<A>(i0 + count)) : s.np;
        const bool add = block < blocks - 1;
        load_queries<T>(a, b, h, i0, count, q);
        load_cotangents<T>(a, b, h, i0, count, q, g, x + at.o, delta, lse);
        scores(count, columns, s.dk, q, s.dkp, kt, tall, s.dvp, strip, s.strip);
        scores(count, columns, s.dvp, g, s.dvp, kt, tall, int64_t(0), ds, s.strip);
        bend<A>(a, h, i0, count, columns, strip, steep, s.strip);
        if (bias != nullptr || a.causal)
          differentiate<true>(a, i0, count, columns, bias, lse, delta, strip, ds, s.strip);
        else
          differentiate<false>(a, i0, count, columns, bias, lse, delta, strip, ds, s.strip);
        if (steep) flatten<A>(a, i0, count, columns, steep, ds, s.strip);
        const bool whole =
            !a.causal || (all_finite(g, count * s.dvp) && all_finite(q, count * s.dkp));
        if (whole) {
          gemm<true>(columns, s.dvp, count, strip, s.strip, g, s.dvp, grads, ld, add);
          gemm<true>(columns, s.dkp, count, ds, s.strip, q, s.dkp, grads + s.dvp, ld, add);
        } else {
          for (int64_t j = 0; !add && j < columns; ++j) clear(grads + j * ld, ld);
          pair_by_pair<true>(i0, count, s.dvp, strip, s.strip, g, s.dvp, grads, ld);
          pair_by_pair<true>(i0, count, s.dkp, ds, s.strip, q, s.dkp, grads + s.dvp, ld);
        }
        gemm(count, s.dkp, columns, ds, s.strip, k, s.dkp, dq, s.dkp, false);
        if (a.causal && !all_finite(dq, count * s.dkp)) {
          clear(dq, count * s.dkp);
          pair_by_pair<false>(i0, count, s.dkp, ds, s.strip, k, s.dkp, dq, s.dkp);
        }
        for (int64_t i = 0; i < count; ++i) {
          store_row(row<T>(a.dqn, b, h, i0 + i), a.dn, dq + i * s.dkp, A(1));
          if (a.dr > 0) store_row(row<T>(a.dqr, b, h, i0 + i), a.dr, dq + i * s.dkp + a.dn, A(1));
        }
      }
      gemm(seen, s.rp, high, grads, ld, w, s.rp, dc, s.rp, true);
      gemm<true>(high, s.rp, seen, grads, ld, c, s.rp,
                 static_cast<A*>(sums.weights) + h * high * s.rp, s.rp, task.add || b > task.b0);
      for (int64_t j = 0; j < seen; ++j)
        add_scaled(dkr + j * s.drp, key_scale<A>(a), grads + j * ld + high, s.drp);
    }
    for (int64_t j = 0; j < a.n; ++j) {
      if (sums.latent != nullptr) {
        A* sum = static_cast<A*>(sums.latent) + (b * a.n + j) * (s.rp + s.drp);
        __builtin_memcpy(sum, dc + j * s.rp, s.rp * sizeof(A));
        __builtin_memcpy(sum + s.rp, dkr + j * s.drp, s.drp * sizeof(A));
        continue;
      }
      store_row(row<T>(a.dc, b, 0, j), a.r, dc + j * s.rp, A(1));
      if (a.dr > 0) store_row(row<T>(a.dkr, b, 0, j), a.dr, dkr + j * s.drp, A(1));
    }
  }
}

/// dc and dk_r of one of the B·N tokens: the sums of all tasks in order.
template <class T>
static void finish_latent(const Mla& a, int64_t token, const void* sums, int64_t count,
                          void* scratch) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  const int64_t width = s.rp + s.drp, b = token / a.n, j = token % a.n;
  A* total = static_cast<A*>(scratch);
  clear(total, width);
  for (int64_t i = 0; i < count; ++i)
    add_scaled(total, A(1), static_cast<const A*>(sums) + (i * a.b * a.n + token) * width, width);
  store_row(row<T>(a.dc, b, 0, j), a.r, total, A(1));
  if (a.dr > 0) store_row(row<T>(a.dkr, b, 0, j), a.dr, total + s.rp, A(1));
}

/// dW_uk and dW_uv of one head: the sums of all tasks in order.
template <class T>
static void finish_weights(const Mla& a, int64_t head, const void* sums, int64_t count,
                           void* scratch, const Rows& duk, const Rows& duv) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  A* total = static_cast<A*>(scratch);
  for (int64_t j = 0; j < s.dvp + a.dn; ++j) {
    if (j >= a.dv && j < s.dvp) continue;
    clear(total, s.rp);
    for (int64_t i = 0; i < count; ++i)
      add_scaled(total, A(1),
                 static_cast<const A*>(sums) + ((i * a.h + head) * (s.dvp + a.dn) + j) * s.rp,
                 s.rp);
    if (j < a.dv)
      store_row(row<T>(duv, 0, head, j), a.r, total, A(1));
    else
      store_row(row<T>(duk, 0, head, j - s.dvp), a.r, total, key_scale<A>(a));
  }
}

template <class A>
static int64_t forward_scratch(const Mla& a) {
  return MlaForward<A>::of(a).size;
}
template <class A>
static int64_t backward_scratch(const Mla& a) {
  return MlaBackward<A>::of(a).size;
}

template <class T>
constexpr MlaKernels mla_kernels = {
    W<acc_t<T>>,     forward_scratch<acc_t<T>>, backward_scratch<acc_t<T>>,
    pack_forward<T>, pack_backward<T>,          forward<T>,
    backward<T>,     finish_latent<T>,          finish_weights<T>};

}  // namespace tab::TAB_ISA
