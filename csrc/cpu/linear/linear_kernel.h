// Linear attention, the arithmetic (formulas: linear.cpp). Included once per instruction set.
//
// A state is one block of scratch: S (D, Ep) and behind it z (Dp), where Dp and Ep are D and Dv
// padded to whole vectors. A gradient state dS, dz has the same form. Tokens come in tiles of
// a.tile; a task is one segment of one (b, head of k and v), and of all heads of q that share it.

#include "../core/triangle.h"

namespace tab::TAB_ISA {

// --- φ --------------------------------------------------------------------------------------------

template <int map, class A>
TAB_INLINE Vec<A> feature(Vec<A> x) {
  if (map == 0) return as<Int<A>>(x) < 0 ? exp<A, true>(x) : x + 1;  // elu(x) + 1, by the sign bit
  return map == 1 ? maximum<A>(Vec<A>{}, x) : x;
}

/// φ'(x) out of φ(x): 1 above an edge and a multiple of φ below it. For elu1, φ > 1 where x > 0,
/// and φ' = φ elsewhere.
template <class A>
struct Slope {
  Vec<A> edge, below;

  TAB_INLINE Slope of(int map) {
    const A edges[] = {1, 0, -A(__builtin_inf())};
    return {splat<A>(edges[map]), splat<A>(map == 0)};
  }
  TAB_INLINE Vec<A> at(const Slope& s, Vec<A> f) { return f > s.edge ? splat<A>(1) : f * s.below; }
};

/// f (count, padded d) = φ of rows of x, which lie `step` apart; masked rows are 0. On the way it
/// asks for rows of another tensor, `beside`, that will be read next, unless that is null.
template <int map, int64_t fixed, class T>
static void load_features(const T* x, int64_t step, const T* beside, int64_t beside_step,
                          const uint8_t* mask, int64_t count, int64_t size, acc_t<T>* f) {
  using A = acc_t<T>;
  const int64_t d = fixed ? fixed : size, dp = padded<A>(d);
  for (int64_t t = 0; t < count; ++t, f += dp, x += step) {
    if (beside != nullptr) prefetch_row(beside + (t + AHEAD) * beside_step, d);
    if (mask != nullptr && !mask[t]) {
      clear(f, dp);
      continue;
    }
    prefetch_row(x + AHEAD * step, d);
    int64_t i = 0;
    for (; i + W<A> <= d; i += W<A>) store(f + i, feature<map, A>(load(x + i)));
    if (i == d) continue;
    store(f + i, feature<map, A>(load_part(x + i, d - i)));
    for (int64_t j = d; j < dp; ++j) f[j] = 0;  // φ(0) may be 1
  }
}

// --- tiles ----------------------------------------------------------------------------------------

/// The tokens [from, to) of head (b, h) of k and v, or of one of q, and how their tiles are loaded.
/// fixed: D and Dv where they are known to be that, so that rows are worked on in registers without
/// loops; else 0.
template <class T, int64_t fixed>
struct Segment {
  using A = acc_t<T>;
  const Linear& a;
  int64_t b, h, from, to, dp, ep;

  TAB_INLINE Segment at(const Linear& a, int64_t task) {
    const int64_t head = task / a.segments, from = task % a.segments * a.length;
    const int64_t to = from + a.length < a.n ? from + a.length : a.n;
    return {a, head / a.h, head % a.h, from, to, padded<A>(a.d), padded<A>(a.e)};
  }
  /// The same tokens of the g-th head of q that shares this one.
  TAB_INLINE Segment of_queries(const Segment& s, int64_t g) {
    return {s.a, s.b, s.h * s.a.group + g, s.from, s.to, s.dp, s.ep};
  }
  TAB_INLINE T* row(const Rows& x, const Segment& s, int64_t t) {
    return static_cast<T*>(x.data) + s.b * x.b + s.h * x.h + t * x.n;
  }
  /// f (count, Dp) = φ of rows t, t+1, …; masked rows are 0.
  TAB_INLINE void features(const Rows& x, const Segment& s, const uint8_t* mask, int64_t t,
                           int64_t count, A* f, const Rows* beside = nullptr) {
    const uint8_t* m = mask == nullptr ? nullptr : mask + s.b * s.a.n + t;
    const T *p = row(x, s, t), *next = beside == nullptr ? nullptr : row(*beside, s, t);
    const int64_t step = beside == nullptr ? 0 : beside->n;
    if (s.a.map == 0) load_features<0, fixed>(p, x.n, next, step, m, count, s.a.d, f);
    if (s.a.map == 1) load_features<1, fixed>(p, x.n, next, step, m, count, s.a.d, f);
    if (s.a.map == 2) load_features<2, fixed>(p, x.n, next, step, m, count, s.a.d, f);
  }
  /// y (count, Ep) = rows t, t+1, … as they are; masked rows are 0: φ(k) = 0 does not hide a NaN.
  TAB_INLINE void values(const Rows& x, const Segment& s, const uint8_t* mask, int64_t t,
                         int64_t count, A* y) {
    const int64_t e = fixed ? fixed : s.a.e, ep = padded<A>(e);
    for (int64_t i = 0; i < count; ++i) {
      if (mask != nullptr && !mask[s.b * s.a.n + t + i]) {
        clear(y + i * ep, ep);
        continue;
      }
      prefetch_row(row(x, s, t + i + AHEAD), e);
      load_row(row(x, s, t + i), e, y + i * ep);
    }
  }
};

/// φ(q) = 0 where a token is masked and its output has no cotangent: whatever its q holds, nobody
/// learns of it.
template <class T, int64_t fixed>
static void drop_queries(const Segment<T, fixed>& s, int64_t t, int64_t count, acc_t<T>* fq) {
  const uint8_t* mask = s.a.mask == nullptr ? nullptr : s.a.mask + s.b * s.a.n + t;
  for (int64_t i = 0; mask != nullptr && i < count; ++i)
    if (!mask[i] && all_zero(Segment<T, fixed>::row(s.a.grad, s, t + i), s.a.e))
      clear(fq + i * s.dp, s.dp);
}

/// z += Σ_i w_i·f_i over the rows f (count, padded width); w null for ones, `low` as in add_to.
template <class A>
static void add_rows(A* z, const A* w, const A* f, int64_t count, int64_t width, A* low) {
  for (int64_t j = 0; j < width; j += W<A>) {
    Vec<A> even{}, odd{};
    int64_t i = 0;
    for (; i + 2 <= count; i += 2) {
      even += load(f + i * width + j) * (w == nullptr ? A(1) : w[i]);
      odd += load(f + (i + 1) * width + j) * (w == nullptr ? A(1) : w[i + 1]);
    }
    if (i < count) even += load(f + i * width + j) * (w == nullptr ? A(1) : w[i]);
    add_to<A>(z + j, even + odd, beside(low, j));
  }
}

/// scale·row of four vectors in registers, past the caches if `past`.
template <class T>
TAB_INLINE void put_row(T* x, const Vec<acc_t<T>> (&row)[4], Vec<acc_t<T>> scale, bool past) {
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j)
    if (past)
      stream(x + j * W<acc_t<T>>, row[j] * scale);
    else
      store(x + j * W<acc_t<T>>, row[j] * scale);
}

/// x = φ'(·)∘df for the gradient of one token, f = φ(·).
template <class T>
TAB_INLINE void write_gradient(T* x, int64_t n, acc_t<T>* df, const acc_t<T>* f,
                               const Slope<acc_t<T>>& slope, bool past) {
  using A = acc_t<T>;
  for (int64_t j = 0; j < n; j += W<A>)
    store(df + j, load(df + j) * Slope<A>::at(slope, load(f + j)));
  write_row(x, n, df, A(1), past);
}

template <class A>
TAB_INLINE A inverse(A den) {
  return den == 0 ? A(0) : 1 / den;
}

// --- steps ----------------------------------------------------------------------------------------

/// state += Σ over the segment of φ(k) vᵀ and φ(k).
template <class T, int64_t fixed>
static void keys(const Linear& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T, fixed>;
  const auto s = S::at(a, task);
  const int64_t d = fixed ? fixed : a.d, e = fixed ? fixed : a.e;
  const int64_t dp = padded<A>(d), ep = padded<A>(e);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *fk = arena.take(a.tile * dp), *v = arena.take(a.tile * ep);
  A *sum = static_cast<A*>(state), *z = sum + d * ep;
  A *low = lost(a, arena, d * ep), *low_z = lost(a, arena, dp);
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
    S::features(a.k, s, a.mask, t, count, fk);
    S::values(a.v, s, a.mask, t, count, v);
    gemm<true>(d, ep, count, fk, dp, v, ep, sum, ep, true, low);
    add_rows<A>(z, nullptr, fk, count, dp, low_z);
  }
}

/// o over the segment. Causal: the state is that before the segment, and leaves as that after it.
template <class T, int64_t fixed>
static void outputs(const Linear& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T, fixed>;
  const auto s = S::at(a, task);
  const int64_t d = fixed ? fixed : a.d, e = fixed ? fixed : a.e;
  const int64_t dp = padded<A>(d), ep = padded<A>(e);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *fq = arena.take(a.tile * dp), *fk = arena.take(a.tile * dp);
  A *v = arena.take(a.tile * ep), *o = arena.take(a.tile * ep);
  A *fkt = arena.take(d * padded<A>(a.tile)), *p = arena.take(a.tile * padded<A>(a.tile));
  A *sum = static_cast<A*>(state), *z = sum + d * ep;
  A *low = lost(a, arena, d * ep), *low_z = lost(a, arena, dp);
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = t + a.tile < s.to ? a.tile : s.to - t, tp = padded<A>(count);
    if (a.causal) {
      S::features(a.k, s, a.mask, t, count, fk);
      S::values(a.v, s, a.mask, t, count, v);
      transpose(count, d, fk, dp, fkt, tp);
    }
    for (int64_t g = 0; g < a.group; ++g) {
      const auto x = S::of_queries(s, g);
      S::features(a.q, x, nullptr, t, count, fq);
      gemm(count, ep, d, fq, dp, sum, ep, o, ep, false);
      if (a.causal) {
        triangle<A>(count, d, fq, dp, fkt, nullptr, p);
        triangle_times<false>(count, ep, p, v, o);
      }
      for (int64_t i = 0; i < count; ++i) {
        A den = dot(fq + i * dp, z, dp) + static_cast<A>(a.eps);
        if (a.causal) {
          Vec<A> own{};
          for (int64_t j = 0; j < tp; j += W<A>) own += load(p + i * tp + j);
          den += tab::TAB_ISA::sum<A>(own);
        }
        write_row(S::row(a.o, x, t + i), e, o + i * ep, inverse(den), a.stream);
      }
    }
    if (a.causal) {
      gemm<true>(d, ep, count, fk, dp, v, ep, sum, ep, true, low);
      add_rows<A>(z, nullptr, fk, count, dp, low_z);
    }
  }
  fence();
}

}  // namespace tab::TAB_ISA

#include "linear_backward.h"
#if TAB_VECTOR_BYTES == 64
#include "linear_wide.h"
#endif

namespace tab::TAB_ISA {

template <class T, int64_t fixed>
constexpr LinearKernels kernels_of = {W<acc_t<T>>, keys<T, fixed>, outputs<T, fixed>,
                                      queries<T, fixed>, gradients<T, fixed>};
template <class T>
constexpr LinearKernels linear_kernels = kernels_of<T, 0>;
template <class T>
constexpr LinearKernels linear_kernels_64 = kernels_of<T, 64>;

}  // namespace tab::TAB_ISA
