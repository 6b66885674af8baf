// FAVOR+ attention: segments, states, features (formulas: performer.cpp). Included by
// performer_kernel.h, once per instruction set.
//
// Features come in panels of P = 2 vectors and tokens in tiles of a.tile: one panel of W, of φ and
// of the state S lies in L1 while it is used, and φ never goes further. A state is one block of
// scratch: S (Mp, Ep), z (Mp), c (Mp), the true sums being S·e^c and z·e^c; Mp is M padded to
// panels, Dp and Ep are D and Dv padded to vectors. Features past M have the exponent -inf.
//
// A gradient state dS, dz of the causal form is held like that too, its exponents are the queries'.

namespace tab::TAB_ISA {

// --- vectors --------------------------------------------------------------------------------------

template <class A>
constexpr int64_t P = 2 * W<A>;
template <class A>
constexpr A INF = __builtin_inff();

template <class A>
TAB_INLINE bool any(Int<A> lanes) {
  typename integer<A>::scalar all = 0;
  for (int64_t i = 0; i < W<A>; ++i) all |= lanes[i];
  return all != 0;
}
TAB_INLINE Vec<double> exp_below(Vec<double> x) { return exp<double>(x); }
/// exp(x) for x < 87, and 0 for x < -88: what is left of a shifted exponent below that is nothing.
/// As `exp` with degree 6 (minimax, 2e-9); NaN gives NaN.
TAB_INLINE Vec<float> exp_below(Vec<float> x) {
  constexpr float magic = 0x1.8p23f + 127;  // with the exponent's bias
  x = at_least<float>(x, -88.1f);           // whose power of two has no bits
  const Vec<float> shifted = x * 0x1.715476p0f + magic, n = shifted - magic;
  const Vec<float> r = (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
  Vec<float> y = splat<float>(0x1.6ab95cp-10f);
  y = y * r + 0x1.126d3p-7f;
  y = y * r + 0x1.55589ap-5f;
  y = y * r + 0x1.55540ap-3f;
  y = y * r + 0x1.fffffap-2f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  return y * as<Vec<float>>(as<Int<float>>(shifted) << 23);
}

// --- segments and states --------------------------------------------------------------------------

template <class A>
struct State {
  A *s, *z, *c;
  A *low_s = nullptr, *low_z = nullptr;  // what the sums of a long segment round away (add_to)
  TAB_INLINE State at(void* state, int64_t mp, int64_t ep) {
    A* s = static_cast<A*>(state);
    return {s, s + mp * ep, s + mp * ep + mp};
  }
  /// The same for a state that a whole segment is added to.
  TAB_INLINE State sum(void* state, int64_t mp, int64_t ep, bool compensated, Arena<A>& arena) {
    State t = at(state, mp, ep);
    if (!compensated) return t;
    t.low_s = arena.take(mp * (ep + 1)), t.low_z = t.low_s + mp * ep;
    clear(t.low_s, mp * (ep + 1));
    return t;
  }
};

/// The tokens [from, to) of head (b, h) of k and v, or of one of q, and how their tiles are loaded.
template <class T>
struct Segment {
  using A = acc_t<T>;
  const Performer& a;
  int64_t b, h, from, to, mp, dp, ep;

  TAB_INLINE Segment at(const Performer& a, int64_t task) {
    const int64_t head = task / a.segments, from = task % a.segments * a.length;
    const int64_t to = from + a.length < a.n ? from + a.length : a.n;
    return {a, head / a.h, head % a.h, from, to, up(a.m, P<A>), padded<A>(a.d), padded<A>(a.e)};
  }
  /// The same tokens of the g-th head of q that shares this one.
  TAB_INLINE Segment of_queries(const Segment& s, int64_t g) {
    return {s.a, s.b, s.h * s.a.group + g, s.from, s.to, s.mp, s.dp, s.ep};
  }
  TAB_INLINE T* row(const Segment& s, const Rows& x, int64_t t) {
    return static_cast<T*>(x.data) + s.b * x.b + s.h * x.h + t * x.n;
  }
  /// y (count, padded width) = rows t, t+1, …
  TAB_INLINE void load(const Segment& s, const Rows& x, int64_t t, int64_t count, int64_t width,
                       A* y) {
    for (int64_t i = 0; i < count; ++i) load_row(row(s, x, t + i), width, y + i * padded<A>(width));
  }
  TAB_INLINE bool masked(const Segment& s, int64_t t) {
    return s.a.mask != nullptr && !s.a.mask[s.b * s.a.n + t];
  }
  /// k, v and what is taken off the exponents of keys: ‖k̂‖²/2, and all of it where a key is masked.
  /// There k and v are 0, since φ(k) = 0 would not hide a NaN.
  TAB_INLINE void load_keys(const Segment& s, int64_t t, int64_t count, A* k, A* v, A* off) {
    load(s, s.a.k, t, count, s.a.d, k);
    load(s, s.a.v, t, count, s.a.e, v);
    for (int64_t i = 0; i < count; ++i) {
      A* x = k + i * s.dp;
      off[i] = s.a.kernel == 0 ? dot(x, x, s.dp) * static_cast<A>(s.a.scale / 2) : A(0);
      if (!masked(s, t + i)) continue;
      off[i] = INF<A>;
      clear(x, s.dp), clear(v + i * s.ep, s.ep);
    }
  }
  /// q, do, lse and r_i = -do_i·o_i. A masked token whose output has no cotangent is dropped, by
  /// lse = ∞ and q = 0: whatever its q holds, nobody learns of it.
  TAB_INLINE void load_queries(const Segment& s, int64_t t, int64_t count, A* q, A* g, A* o, A* r,
                               A* lse) {
    load(s, s.a.q, t, count, s.a.d, q);
    load(s, s.a.grad, t, count, s.a.e, g);
    const A* all = lse_of(s, t);
    for (int64_t i = 0; i < count; ++i) {
      load_row(row(s, s.a.o, t + i), s.a.e, o);
      r[i] = -dot(g + i * s.ep, o, s.ep), lse[i] = all[i];
      if (!masked(s, t + i) || !all_zero(row(s, s.a.grad, t + i), s.a.e)) continue;
      r[i] = 0, lse[i] = INF<A>;
      clear(q + i * s.dp, s.dp);
    }
  }
  /// Of a head of q.
  TAB_INLINE A* lse_of(const Segment& s, int64_t t) {
    return static_cast<A*>(s.a.lse) + (s.b * s.a.h * s.a.group + s.h) * s.a.row + t;
  }
  TAB_INLINE int64_t count(const Segment& s, int64_t t) {
    return t + s.a.tile < s.to ? s.a.tile : s.to - t;
  }
};

/// W·D^(-1/4) for both of its uses: panels (Mp/P, D, P) and rows (Mp, Dp), zero past M.
template <class A>
static void pack(const Performer& a, const void* projection) {
  const A *w = static_cast<const A*>(projection), scale = static_cast<A>(a.root);
  const int64_t dp = padded<A>(a.d), mp = up(a.m, P<A>);
  A *panels = static_cast<A*>(a.panels), *rows = static_cast<A*>(a.rows);
  for (int64_t m = 0; m < mp; ++m)
    for (int64_t i = 0; i < dp; ++i) {
      const A x = m < a.m && i < a.d ? w[m * a.d + i] * scale : A(0);
      rows[m * dp + i] = x;
      if (i < a.d) panels[m / P<A> * P<A> * a.d + i * P<A> + m % P<A>] = x;
    }
}

// --- one panel ------------------------------------------------------------------------------------

/// x (count, P) = rows·Wᵀ, the exponents of panel p before anything is taken off.
template <class T, class A = acc_t<T>>
TAB_INLINE void exponents(const Segment<T>& s, int64_t p, int64_t count, const A* rows, A* x) {
  const A* panel = static_cast<const A*>(s.a.panels) + p * P<A> * s.a.d;
  gemm_panel<false, 2>(count, s.a.d, rows, s.dp, panel, P<A>, x, P<A>, false);
  for (int64_t m = s.a.m - p * P<A>; m < P<A>; ++m)
    for (int64_t i = 0; i < count; ++i) x[i * P<A> + m] = -INF<A>;
}

/// x = φ: e^(x - off_i + shift), or relu(x)·e^(-off_i).
template <class A>
TAB_INLINE void features(int kernel, int64_t count, A* x, const Vec<A>* shift, const A* off) {
  if (kernel == 1) {
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> factor = exp<A>(splat<A>(-off[i]));
      for (int64_t j = 0; j < P<A>; j += W<A>)
        store(x + i * P<A> + j, maximum<A>(Vec<A>{}, load(x + i * P<A> + j)) * factor);
    }
    return;
  }
  const Vec<A> s0 = shift[0], s1 = shift[1];
  for (int64_t i = 0; i < count; ++i, x += P<A>) {
    store(x, exp_below(load(x) - off[i] + s0));
    store(x + W<A>, exp_below(load(x + W<A>) - off[i] + s1));
  }
}

/// y = (y + weight_i·z)·φ', given φ: the gradient of the exponents.
template <class A>
TAB_INLINE void slopes(int kernel, int64_t count, A* y, const A* weight, const A* z, const A* phi,
                       const A* off) {
  for (int64_t j = 0; j < P<A>; j += W<A>) {
    const Vec<A> zj = load(z + j);
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> f = load(phi + i * P<A> + j);
      Vec<A> slope = f;
      if (kernel == 1) slope = f > 0 ? exp<A>(splat<A>(-off[i])) : Vec<A>{};
      store(y + i * P<A> + j, (load(y + i * P<A> + j) + zj * weight[i]) * slope);
    }
  }
}

/// top = its maximum with x_i - off_i over the tile.
template <class A>
TAB_INLINE void raise(int64_t count, const A* x, const A* off, Vec<A>* top) {
  for (int64_t i = 0; i < count; ++i, x += P<A>) {
    top[0] = maximum<A>(load(x) - off[i], top[0]);
    top[1] = maximum<A>(load(x + W<A>) - off[i], top[1]);
  }
}

/// Moves panel p of a state from its shift to `top` ≥ it; few features of later tiles do move.
template <class A>
TAB_INLINE void rescale(const State<A>& t, int64_t p, int64_t ep, const Vec<A>* top) {
  for (int64_t j = 0; j < 2; ++j) {
    const int64_t m = p * P<A> + j * W<A>;
    const Vec<A> before = load(t.c + m);
    if (!any<A>(top[j] > before)) continue;
    const Vec<A> factor = exp_below(before - finite<A>(top[j]));
    store(t.c + m, top[j]);
    store(t.z + m, load(t.z + m) * factor);
    if (t.low_z != nullptr) store(t.low_z + m, load(t.low_z + m) * factor);
    for (int64_t i = 0; i < W<A>; ++i) {
      if (factor[i] == 1) continue;
      multiply<A>(t.s + (m + i) * ep, factor[i], ep);
      if (t.low_s != nullptr) multiply<A>(t.low_s + (m + i) * ep, factor[i], ep);
    }
  }
}

/// Panel p of a state += Σ_i φ_i·(values_i, weight_i)
template <class A>
TAB_INLINE void accumulate_panel(const State<A>& t, int64_t p, int64_t ep, int64_t count,
                                 const A* phi, const A* values, const A* weight) {
  for (int64_t j = 0; j < P<A>; j += W<A>) {
    Vec<A> sum{};
    for (int64_t i = 0; i < count; ++i) sum += load(phi + i * P<A> + j) * weight[i];
    add_to<A>(t.z + p * P<A> + j, sum, beside(t.low_z, p * P<A> + j));
  }
  gemm<true>(P<A>, ep, count, phi, P<A>, values, ep, t.s + p * P<A> * ep, ep, true,
             beside(t.low_s, p * P<A> * ep));
}

/// state += a tile of rows (keys, or queries of a gradient state) at the state's running maximum.
template <class T, class A = acc_t<T>>
static void absorb(const Segment<T>& s, int64_t count, const A* rows, const A* off, const A* values,
                   const A* weight, const State<A>& t, A* x) {
  for (int64_t p = 0; p < s.mp / P<A>; ++p) {
    exponents(s, p, count, rows, x);
    Vec<A> top[2] = {load(t.c + p * P<A>), load(t.c + p * P<A> + W<A>)};
    if (s.a.kernel == 0) {
      raise(count, x, off, top);
      rescale(t, p, s.ep, top);
    }
    top[0] = -finite<A>(top[0]), top[1] = -finite<A>(top[1]);
    features(s.a.kernel, count, x, top, off);
    accumulate_panel(t, p, s.ep, count, x, values, weight);
  }
}

}  // namespace tab::TAB_ISA
