// Multi-head latent attention, the fused forward pass (formulas: mla.cpp), and what the backward
// pass shares with it. Included once per instruction set.
//
// Once per batch entry, for all heads: cᵀ in tiles of 64 tokens, (R, 64) each, so that it is the
// right-hand side of W_uk cᵀ = Kᵀ and the transposed left-hand side of c W_uvᵀ = V. Per head the
// tiles [Kᵀ; k_rᵀ] (Dn+Dr, 64) and V (N, Dvp) are expanded into scratch, then for `rows` queries at
// a time S = [q_n q_r]·[Kᵀ; k_rᵀ] is a whole strip of rows: softmax needs no second visit. Kᵀ carries
// scale·log₂e, so that P = 2^(S - max), or scale/c where there is a cap.

#include "../core/tanh.h"

namespace tab::TAB_ISA {

constexpr int64_t KEYS = 64;  // tokens in a tile of latents

/// Sizes padded to whole vectors.
template <class A>
struct MlaSizes {
  int64_t dk, dkp, dvp, rp, drp, np, tiles, strip;

  TAB_INLINE MlaSizes of(const Mla& a) {
    MlaSizes s{};
    s.dk = a.dn + a.dr, s.dkp = padded<A>(s.dk), s.dvp = padded<A>(a.dv), s.rp = padded<A>(a.r);
    s.drp = padded<A>(a.dr), s.np = padded<A>(a.n), s.tiles = ceiling(a.n, KEYS);
    s.strip = s.np + W<A>;  // rows of scores do not lie a power of two apart
    return s;
  }
};

/// Pieces of one buffer as offsets, so that the driver can ask for the size before there is one.
template <class A>
struct Pieces {
  int64_t size = 0;
  TAB_INLINE int64_t take(Pieces& p, int64_t n) {
    const int64_t at = p.size;
    p.size += Arena<A>::cost(n);
    return at;
  }
};

/// What Kᵀ and k_rᵀ are multiplied with.
template <class A>
TAB_INLINE A key_scale(const Mla& a) {
  return a.softcap > 0 ? A(a.scale / a.softcap) : A(a.scale) * LOG2E<A>;
}

// --- latents and queries --------------------------------------------------------------------------

/// Rows of a masked token are 0: a weight of 0 would not hide a NaN.
template <class A>
TAB_INLINE void hide_masked(const Mla& a, int64_t b, int64_t t, int64_t count, int64_t width,
                            A* x) {
  for (int64_t i = 0; a.mask != nullptr && i < count; ++i)
    if (!a.mask[b * a.n + t + i]) clear(x + i * width, width);
}

/// c (Np, Rp), cᵀ (tiles, R, 64) and scaled k_rᵀ, the last `dr` of `tall` rows of each tile.
template <class T>
static void load_latents(const Mla& a, int64_t b, acc_t<T>* c, acc_t<T>* ct, acc_t<T>* kt,
                         int64_t tall, acc_t<T>* turn) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  for (int64_t t = 0; t < a.n; t += KEYS) {
    const int64_t count = least(KEYS, a.n - t);
    load_rows<T>(row<T>(a.c, b, 0, t), a.c.n, count, a.r, c + t * s.rp);
    hide_masked(a, b, t, count, s.rp, c + t * s.rp);
    transpose(count, a.r, c + t * s.rp, s.rp, ct + t * a.r, KEYS);
    if (a.dr == 0) continue;
    A* krt = kt + (t / KEYS * tall + tall - a.dr) * KEYS;
    load_rows<T>(row<T>(a.kr, b, 0, t), a.kr.n, count, a.dr, turn);
    hide_masked(a, b, t, count, s.drp, turn);
    transpose(count, a.dr, turn, s.drp, krt, KEYS);
    for (int64_t i = 0; i < a.dr; ++i) multiply(krt + i * KEYS, key_scale<A>(a), padded<A>(count));
  }
}

/// 0 for a visible key, -∞ for a masked one and for the padding.
template <class A>
static void load_bias(const Mla& a, int64_t b, A* bias) {
  for (int64_t j = 0; j < padded<A>(a.n); ++j) {
    const bool seen = j < a.n && (a.mask == nullptr || a.mask[b * a.n + j]);
    bias[j] = seen ? A(0) : A(-__builtin_inf());
  }
}

/// q (count, Dkp) = [q_n q_r], the padding zeroed. Writes up to one vector past the last row.
template <class T>
static void load_queries(const Mla& a, int64_t b, int64_t h, int64_t i0, int64_t count,
                         acc_t<T>* q) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  for (int64_t i = 0; i < count; ++i, q += s.dkp) {
    prefetch_row(row<T>(a.qn, b, h, i0 + i + AHEAD), a.dn);
    store(q + s.dkp - W<A>, Vec<A>{});
    load_row(row<T>(a.qn, b, h, i0 + i), a.dn, q);
    if (a.dr == 0) continue;
    prefetch_row(row<T>(a.qr, b, h, i0 + i + AHEAD), a.dr);
    load_row(row<T>(a.qr, b, h, i0 + i), a.dr, q + a.dn);
  }
}

/// s (count, columns) = q · the rows below `skip` of the tiles.
template <class A>
static void scores(int64_t count, int64_t columns, int64_t depth, const A* q, int64_t ldq,
                   const A* tiles, int64_t tall, int64_t skip, A* s, int64_t lds) {
  for (int64_t j = 0; j < columns; j += KEYS)
    gemm(count, least(KEYS, columns - j), depth, q, ldq, tiles + (j / KEYS * tall + skip) * KEYS,
         KEYS, s + j, lds, false);
}

/// How far row i of the strip is of use.
template <class A>
TAB_INLINE int64_t seen_columns(const Mla& a, int64_t i, int64_t columns) {
  return a.causal ? least(columns, padded<A>(i + 1)) : columns;
}

/// s (count, columns), the products x = key_scale·q·k, becomes log₂e·(c·tanh(x) - m·|i - j|), and
/// `steep` its slope in x where there is a cap. Nothing to do where the call asks for neither.
template <class A>
static void bend(const Mla& a, int64_t h, int64_t i0, int64_t count, int64_t columns, A* s,
                 A* steep, int64_t ld) {
  typedef typename integer<A>::scalar I;
  if (a.softcap <= 0 && a.slopes == nullptr) return;
  const A cap = A(a.softcap) * LOG2E<A>;
  const A slope = a.slopes ? static_cast<const A*>(a.slopes)[h] * LOG2E<A> : A(0);
  for (int64_t i = 0; i < count; ++i, s += ld) {
    const int64_t seen = seen_columns<A>(a, i0 + i, columns);
    for (int64_t j = 0; j < seen; j += W<A>) {
      Vec<A> x = load(s + j);
      if (a.softcap > 0) {
        x = tanh<A>(x);
        if (steep) store(steep + i * ld + j, cap * (A(1) - x * x));
        x *= cap;
      }
      if (a.slopes) {
        const auto far = __builtin_convertvector(lanes<A>() + I(j - i0 - i), Vec<A>);
        x -= slope * maximum<A>(far, -far);
      }
      store(s + j, x);
    }
  }
}

/// Adds -∞ where query i must not see the keys j, j+1, …
template <bool masked, class A>
TAB_INLINE Vec<A> hide(Vec<A> x, const A* bias, bool causal, int64_t i, int64_t j) {
  if constexpr (masked) {
    if (bias != nullptr) x += load(bias + j);
    if (causal && j + W<A> > i + 1) {
      const auto last = static_cast<typename integer<A>::scalar>(i - j);
      x = lanes<A>() > last ? splat<A>(-__builtin_inf()) : x;
    }
  }
  return x;
}

/// p = 2^(s - max) in place, with the maximum and the sum of each row.
template <bool masked, class A>
static void softmax(const Mla& a, int64_t i0, int64_t count, int64_t columns, const A* bias, A* s,
                    int64_t lds, A* top, A* total) {
  for (int64_t i = 0; i < count; ++i, s += lds) {
    const int64_t seen = seen_columns<A>(a, i0 + i, columns);
    Vec<A> high = splat<A>(-__builtin_inf()), all{};
    for (int64_t j = 0; j < seen; j += W<A>) {
      const Vec<A> x = hide<masked>(load(s + j), bias, a.causal, i0 + i, j);
      if (masked) store(s + j, x);
      high = maximum<A>(high, x);
    }
    top[i] = highest<A>(high);
    const Vec<A> shift = finite<A>(splat<A>(top[i]));
    for (int64_t j = 0; j < seen; j += W<A>) {
      const Vec<A> p = exp2<A>(load(s + j) - shift);
      store(s + j, p);
      all += p;
    }
    total[i] = sum<A>(all);
    clear(s + seen, columns - seen);
  }
}

/// y (count, width) += P·x of the queries i0 … over the keys each of them sees when causal, or
/// `to_keys` Pᵀ·x: term by term, since x holds NaN or ∞ and a weight of 0 would not hide it.
template <bool to_keys, class A>
static __attribute__((noinline)) void pair_by_pair(int64_t i0, int64_t count, int64_t width,
                                                   const A* p, int64_t ldp, const A* x, int64_t ldx,
                                                   A* y, int64_t ldy) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i0 + i; ++j)
      add_scaled(y + (to_keys ? j : i) * ldy, p[i * ldp + j], x + (to_keys ? i : j) * ldx, width);
}

/// The larger one, NaN if either is.
template <class A>
TAB_INLINE A larger(A x, A y) {
  return x != x || x > y ? x : y;
}

// --- forward --------------------------------------------------------------------------------------

/// Packed weights of a head: scaled W_uk (Dn, Rp), then W_uvᵀ (R, Dvp).
template <class T>
static void pack_forward(const Mla& a, int64_t head, void* scratch) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  A* w = static_cast<A*>(a.weights) + head * (a.dn * s.rp + a.r * s.dvp);
  load_rows<T>(row<T>(a.uk, 0, head, 0), a.uk.n, a.dn, a.r, w);
  multiply(w, key_scale<A>(a), a.dn * s.rp);
  A* uv = static_cast<A*>(scratch);
  load_rows<T>(row<T>(a.uv, 0, head, 0), a.uv.n, a.dv, a.r, uv);
  transpose(a.dv, a.r, uv, s.rp, w + a.dn * s.rp, s.dvp);
}

template <class A>
struct MlaForward : Pieces<A> {
  int64_t c, ct, kt, turn, v, bias, q, strip, o;

  TAB_INLINE MlaForward of(const Mla& a) {
    const auto s = MlaSizes<A>::of(a);
    MlaForward p{};
    p.c = Pieces<A>::take(p, s.tiles * KEYS * s.rp);
    p.ct = Pieces<A>::take(p, s.tiles * KEYS * a.r);
    p.kt = Pieces<A>::take(p, s.tiles * KEYS * s.dk);
    p.turn = Pieces<A>::take(p, KEYS * s.drp);
    p.v = Pieces<A>::take(p, s.tiles * KEYS * s.dvp);
    p.bias = Pieces<A>::take(p, s.np);
    p.q = Pieces<A>::take(p, a.rows * s.dkp + W<A>);
    p.strip = Pieces<A>::take(p, a.rows * s.strip);
    p.o = Pieces<A>::take(p, a.rows * s.dvp);
    return p;
  }
};

/// o, lse and the largest score of the queries of one task. `peaks` (B, H) are its own.
template <class T>
static void forward(const Mla& a, const MlaTask& task, void* peaks, void* scratch) {
  using A = acc_t<T>;
  const auto s = MlaSizes<A>::of(a);
  const auto at = MlaForward<A>::of(a);
  A* x = static_cast<A*>(scratch);
  A *ct = x + at.ct, *kt = x + at.kt, *v = x + at.v, *q = x + at.q, *strip = x + at.strip;
  A *o = x + at.o, *bias = a.mask != nullptr || s.np != a.n ? x + at.bias : nullptr;
  A top[KEYS], total[KEYS];
  const int64_t seen = a.causal ? task.q1 : a.n;  // keys that any query of the task sees
  for (int64_t b = task.b0; b < task.b1; ++b) {
    load_latents<T>(a, b, x + at.c, ct, kt, s.dk, x + at.turn);
    if (bias != nullptr) load_bias(a, b, bias);
    for (int64_t h = task.h0; h < task.h1; ++h) {
      const A* uk = static_cast<const A*>(a.weights) + h * (a.dn * s.rp + a.r * s.dvp);
      const A* uvt = uk + a.dn * s.rp;
      for (int64_t t = 0; t < seen; t += KEYS) {
        const int64_t columns = padded<A>(least(KEYS, a.n - t));
        gemm(a.dn, columns, a.r, uk, s.rp, ct + t * a.r, KEYS, kt + t * s.dk, KEYS, false);
        gemm<true>(columns, s.dvp, a.r, ct + t * a.r, KEYS, uvt, s.dvp, v + t * s.dvp, s.dvp,
                   false);
      }
      A peak = -__builtin_inf();
      for (int64_t i0 = task.q0; i0 < task.q1; i0 += a.rows) {
        const int64_t count = least(a.rows, task.q1 - i0);
        const int64_t columns = a.causal ? least(s.np, padded<A>(i0 + count)) : s.np;
        load_queries<T>(a, b, h, i0, count, q);
        scores(count, columns, s.dk, q, s.dkp, kt, s.dk, 0, strip, s.strip);
        bend<A>(a, h, i0, count, columns, strip, nullptr, s.strip);
        if (bias != nullptr || a.causal)
          softmax<true>(a, i0, count, columns, bias, strip, s.strip, top, total);
        else
          softmax<false>(a, i0, count, columns, bias, strip, s.strip, top, total);
        gemm(count, s.dvp, columns, strip, s.strip, v, s.dvp, o, s.dvp, false);
        if (a.causal && !all_finite(o, count * s.dvp)) {  // a later key's fault, perhaps
          clear(o, count * s.dvp);
          pair_by_pair<false>(i0, count, s.dvp, strip, s.strip, v, s.dvp, o, s.dvp);
        }
        A* lse = static_cast<A*>(a.lse) + (b * a.h + h) * a.row + i0;
        for (int64_t i = 0; i < count; ++i) {
          store_row(row<T>(a.o, b, h, i0 + i), a.dv, o + i * s.dvp,
                    total[i] == 0 ? A(0) : 1 / total[i]);
          lse[i] = (top[i] + log2(total[i])) * LN2<A>;
          const bool real = a.mask == nullptr || a.mask[b * a.n + i0 + i];
          // The maximum passes over a NaN score, the sum does not; ∞ makes it NaN too.
          const bool lost = total[i] != total[i] && top[i] != A(__builtin_inf());
          if (real) peak = larger<A>(peak, lost ? total[i] : top[i]);
        }
      }
      static_cast<A*>(peaks)[b * a.h + h] = peak * LN2<A>;
    }
  }
}

}  // namespace tab::TAB_ISA

#include "mla_backward.h"
