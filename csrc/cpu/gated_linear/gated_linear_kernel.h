// Gated linear attention, the arithmetic (formulas: gated_linear.cpp). Included once per instruction
// set.
//
// A state is S (D, Ep), where Ep is Dv padded to whole vectors, and behind it one number. Tokens come
// in tiles of a.tile; a task is one segment of one (b, head of k and v), and of all heads of q that
// share it. q is scaled as it is loaded.

#include "../core/triangle.h"

namespace tab::TAB_ISA {

// --- tiles ----------------------------------------------------------------------------------------

/// The tokens [from, to) of head (b, h) of k and v, or of one of q, and how their tiles are loaded.
template <class T>
struct Segment {
  using A = acc_t<T>;
  const Gated& a;
  int64_t b, h, from, to, dp, ep, tp;

  TAB_INLINE Segment at(const Gated& a, int64_t task) {
    const int64_t head = task / a.segments, from = task % a.segments * a.length;
    return {a,
            head / a.h,
            head % a.h,
            from,
            least(from + a.length, a.n),
            padded<A>(a.d),
            padded<A>(a.e),
            padded<A>(a.tile)};
  }
  /// The same tokens of the g-th head of q that shares this one.
  TAB_INLINE Segment of_queries(const Segment& s, int64_t g) {
    return {s.a, s.b, s.h * s.a.group + g, s.from, s.to, s.dp, s.ep, s.tp};
  }
  TAB_INLINE bool masked(const Segment& s, int64_t t) {
    return s.a.mask != nullptr && !s.a.mask[s.b * s.a.n + t];
  }
  /// y (count, padded width) = rows t, t+1, …; of keys and values the masked ones are 0.
  TAB_INLINE void load(const Segment& s, const Rows& x, bool hide, int64_t t, int64_t count,
                       int64_t width, A* y) {
    for (int64_t i = 0; i < count; ++i, y += padded<A>(width)) {
      if (hide && masked(s, t + i)) {
        clear(y, padded<A>(width));
        continue;
      }
      prefetch_row(row<T>(x, s.b, s.h, t + i + AHEAD), width);
      load_row(row<T>(x, s.b, s.h, t + i), width, y);
    }
  }
  /// The number of the tile that begins at token t, among those of all heads.
  TAB_INLINE int64_t tile(const Segment& s, int64_t t) {
    return (s.b * s.a.h + s.h) * ceiling(s.a.n, s.a.tile) + t / s.a.tile;
  }
  TAB_INLINE void queries(const Segment& s, int64_t t, int64_t count, A* q) {
    load(s, s.a.q, false, t, count, s.a.d, q);
    multiply(q, static_cast<A>(s.a.scale), count * s.dp);
  }
};

/// exp of each of n padded elements, ∞ where that overflows.
template <class A>
TAB_INLINE void exponentials(A* x, int64_t n) {
  const Vec<A> most = splat<A>(sizeof(A) == 4 ? A(89) : A(710));
  for (int64_t i = 0; i < n; i += W<A>) {
    const Vec<A> y = load(x + i);
    store(x + i, exp<A>(y > most ? most : y));
  }
}

/// Of a tile: e^(g_i); from before the tile until token i has been; from token j to its end; of all.
template <class A>
struct Decays {
  A *own, *until, *after, total, log_total;

  TAB_INLINE Decays take(Arena<A>& arena, int64_t tp) {
    return {arena.take(tp), arena.take(tp), arena.take(tp), 1, 0};
  }
};

/// Every exponent is a sum of its own, not a difference of two. A masked token decays nothing.
template <class T, class A = acc_t<T>>
static void decays(const Segment<T>& s, int64_t t, int64_t count, Decays<A>& x) {
  const A* g = row<A>(s.a.g, s.b, s.h, t);
  clear(x.own, s.tp), clear(x.until, s.tp), clear(x.after, s.tp);
  A sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    x.own[i] = Segment<T>::masked(s, t + i) ? A(0) : g[i * s.a.g.n];
    x.until[i] = sum += x.own[i];
  }
  x.log_total = sum, sum = 0;
  for (int64_t i = count - 1; i >= 0; --i) x.after[i] = sum, sum += x.own[i];
  exponentials(x.own, s.tp), exponentials(x.until, s.tp), exponentials(x.after, s.tp);
  x.total = x.until[count - 1];
}

/// Behind a sum over a segment: the decay of all its tokens. x (W) is scratch.
template <class T, class A = acc_t<T>>
TAB_INLINE void leave_decay(const Segment<T>& s, A logs, A* sum, A* x) {
  store(x, splat<A>(logs));
  exponentials(x, W<A>);
  sum[s.a.d * s.ep] = x[0];
}

/// p_ij *= e^(g_{j+1} + … + g_i) for j ≤ i, and 0 behind the diagonal: from one row to the next all
/// factors gain e^(g_i). e (Tp) is scratch.
template <class A>
static void decay_pairs(int64_t count, const A* own, A* p, A* e) {
  const int64_t tp = padded<A>(count);
  clear(e, tp);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; j += W<A>) {
      const Int<A> at = lanes<A>(),
                   self = static_cast<typename integer<A>::scalar>(i - j) - Int<A>{};
      const Vec<A> longer = load(e + j) * own[i];
      const Vec<A> factor = at < self ? longer : at == self ? splat<A>(1) : Vec<A>{};
      store(e + j, factor);
      store(p + i * tp + j, at > self ? Vec<A>{} : load(p + i * tp + j) * factor);
    }
}

/// dg_t (count) = Σ_{j<t≤i} m_ij, m = dp∘p. sums (Tp) is scratch: from the last row up, Σ_{i≥t} m_ij.
template <class A>
static void pair_gradients(int64_t count, const A* dp, const A* p, A* dg, A* sums) {
  const int64_t tp = padded<A>(count);
  clear(sums, tp);
  for (int64_t i = count - 1; i >= 0; --i) {
    Vec<A> all{};
    for (int64_t j = 0; j < i; j += W<A>) {
      const Int<A> self = static_cast<typename integer<A>::scalar>(i - j) - Int<A>{};
      const Vec<A> more = load(sums + j) + load(dp + i * tp + j) * load(p + i * tp + j);
      store(sums + j, more);
      all += lanes<A>() < self ? more : Vec<A>{};
    }
    dg[i] = sum<A>(all);
  }
}

/// sum (m, n) = total·sum + aᵀ·b over the tokens of a tile, a (count, m) and b (count, n).
template <class A>
TAB_INLINE void step(int64_t m, int64_t n, int64_t count, A total, const A* a, int64_t lda,
                     const A* b, A* sum, A* low) {
  if (total != 1) {
    multiply(sum, total, m * n);
    if (low != nullptr) multiply(low, total, m * n);
  }
  gemm<true>(m, n, count, a, lda, b, n, sum, n, true, low);
}

/// x_i *= factor_i over the rows of x (count, padded width).
template <class A>
TAB_INLINE void scale_rows(A* x, const A* factor, int64_t count, int64_t width) {
  for (int64_t i = 0; i < count; ++i) multiply(x + i * width, factor[i], width);
}

// --- steps ----------------------------------------------------------------------------------------

/// The state taken along the segment, with the decay of its tokens, and kept before each tile.
template <class T>
static void keys(const Gated& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep), *sum = static_cast<A*>(state);
  auto decay = Decays<A>::take(arena, s.tp);
  A *low = lost(a, arena, a.d * s.ep), logs = 0;
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = least(a.tile, s.to - t);
    if (a.kept != nullptr) {
      A* kept = static_cast<A*>(a.kept) + S::tile(s, t) * a.d * s.ep;
      __builtin_memcpy(kept, sum, a.d * s.ep * sizeof(A));
    }
    S::load(s, a.k, true, t, count, a.d, k);
    S::load(s, a.v, true, t, count, a.e, v);
    decays(s, t, count, decay);
    scale_rows(k, decay.after, count, s.dp);
    step(a.d, s.ep, count, decay.total, k, s.dp, v, sum, low);
    logs += decay.log_total;
  }
  leave_decay(s, logs, sum, decay.own);
}

/// o over the segment. The state is that before the segment, and leaves as that after it.
template <class T>
static void outputs(const Gated& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *q = arena.take(a.tile * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *o = arena.take(a.tile * s.ep), *kt = arena.take(a.d * s.tp), *p = arena.take(a.tile * s.tp);
  A *e = arena.take(s.tp), *sum = static_cast<A*>(state);
  auto decay = Decays<A>::take(arena, s.tp);
  A* low = lost(a, arena, a.d * s.ep);
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = least(a.tile, s.to - t);
    S::load(s, a.k, true, t, count, a.d, k);
    S::load(s, a.v, true, t, count, a.e, v);
    decays(s, t, count, decay);
    transpose(count, a.d, k, s.dp, kt, padded<A>(count));
    for (int64_t head = 0; head < a.group; ++head) {
      const auto x = S::of_queries(s, head);
      S::queries(x, t, count, q);
      gemm(count, s.ep, a.d, q, s.dp, sum, s.ep, o, s.ep, false);
      scale_rows(o, decay.until, count, s.ep);
      triangle<A>(count, a.d, q, s.dp, kt, nullptr, p);
      decay_pairs(count, decay.own, p, e);
      triangle_times<false>(count, s.ep, p, v, o);
      for (int64_t i = 0; i < count; ++i)
        write_row(row<T>(a.o, s.b, x.h, t + i), a.e, o + i * s.ep, A(1), a.stream);
    }
    scale_rows(k, decay.after, count, s.dp);
    step(a.d, s.ep, count, decay.total, k, s.dp, v, sum, low);
  }
  fence();
}

}  // namespace tab::TAB_ISA

#include "gated_linear_backward.h"

namespace tab::TAB_ISA {

template <class T>
constexpr GatedKernels gated_kernels = {W<acc_t<T>>, keys<T>, outputs<T>, reads<T>, gradients<T>};

}  // namespace tab::TAB_ISA
