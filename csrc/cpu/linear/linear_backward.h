// Linear attention, the backward pass (formulas: linear.cpp). Included by linear_kernel.h, once per
// instruction set.

namespace tab::TAB_ISA {

/// g (count, Ep) = do·(1/den), 1/den as noted by `queries`.
template <class T, int64_t fixed>
TAB_INLINE void cotangents(const Segment<T, fixed>& s, int64_t t, int64_t count,
                           const acc_t<T>* inverses, acc_t<T>* g) {
  Segment<T, fixed>::values(s.a.grad, s, nullptr, t, count, g);
  for (int64_t i = 0; i < count; ++i) multiply(g + i * s.ep, inverses[i], s.ep);
}

/// Where 1/den of the tokens t, t+1, … of a head of q is noted; r is a.n behind it.
template <class T, int64_t fixed, class A = acc_t<T>>
TAB_INLINE A* noted(const Segment<T, fixed>& s, int64_t t) {
  return static_cast<A*>(s.a.notes) + 2 * (s.b * s.a.h * s.a.group + s.h) * s.a.n + t;
}

/// dq over the segment; dstate += Σ φ(q) gᵀ and φ(q) r unless it is null. Causal: `state` as in
/// `outputs`; notes (1/den, r) of each token for `gradients`.
template <class T, int64_t fixed>
static void queries(const Linear& a, int64_t task, void* state, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T, fixed>;
  const auto s = S::at(a, task);
  const auto slope = Slope<A>::of(a.map);
  const int64_t d = fixed ? fixed : a.d, e = fixed ? fixed : a.e;
  const int64_t dp = padded<A>(d), ep = padded<A>(e);
  Arena<A> arena{static_cast<A*>(scratch)};
  const int64_t tp = padded<A>(a.tile);
  A *fq = arena.take(a.tile * dp), *fk = arena.take(a.tile * dp);
  A *v = arena.take(a.tile * ep), *g = arena.take(a.tile * ep);
  A *df = arena.take(a.tile * dp), *st = arena.take(e * dp);
  A *vt = arena.take(e * tp), *p = arena.take(a.tile * tp), *r = arena.take(a.tile);
  A *den = arena.take(a.tile), *seen = arena.take(dp);
  A *z = static_cast<A*>(state) + d * ep, *dsum = static_cast<A*>(dstate);
  A *low = lost(a, arena, d * ep), *low_dz = lost(a, arena, dp);
  A* low_st = a.causal ? lost(a, arena, e * dp) : nullptr;
  A* low_z = a.causal ? lost(a, arena, dp) : nullptr;
  transpose(d, e, static_cast<A*>(state), ep, st, dp);  // (Dv, Dp)
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
    if (a.causal) {
      S::features(a.k, s, a.mask, t, count, fk);
      S::values(a.v, s, a.mask, t, count, v);
      transpose(count, e, v, ep, vt, padded<A>(count));
    }
    for (int64_t head = 0; head < a.group; ++head) {
      const auto x = S::of_queries(s, head);
      S::features(a.q, x, nullptr, t, count, fq);
      S::values(a.grad, x, nullptr, t, count, g);
      drop_queries(x, t, count, fq);
      __builtin_memcpy(seen, z, dp * sizeof(A));  // z as each token of the tile finds it
      for (int64_t i = 0; i < count; ++i) {
        if (a.causal) add_scaled(seen, A(1), fk + i * dp, dp);
        den[i] = inverse(dot(fq + i * dp, seen, dp) + static_cast<A>(a.eps));
        multiply(g + i * ep, den[i], ep);
      }
      gemm(count, dp, e, g, ep, st, dp, df, dp, false);
      if (a.causal) {
        triangle<A>(count, e, g, ep, vt, nullptr, p);
        triangle_times<false>(count, dp, p, fk, df);
      }
      __builtin_memcpy(seen, z, dp * sizeof(A));
      for (int64_t i = 0; i < count; ++i) {  // df is S g: with φ(q) it gives g·o/inverse
        if (a.causal) add_scaled(seen, A(1), fk + i * dp, dp);
        r[i] = -den[i] * dot(fq + i * dp, df + i * dp, dp);
        add_scaled(df + i * dp, r[i], seen, dp);
        write_gradient(S::row(a.dq, x, t + i), d, df + i * dp, fq + i * dp, slope, a.stream);
      }
      if (a.causal) {
        A* notes = noted(x, t);
        for (int64_t i = 0; i < count; ++i) notes[i] = den[i], notes[a.n + i] = r[i];
      }
      if (dstate != nullptr) {
        gemm<true>(d, ep, count, fq, dp, g, ep, dsum, ep, true, low);
        add_rows<A>(dsum + d * ep, r, fq, count, dp, low_dz);
      }
    }
    if (a.causal) {
      gemm<true>(e, dp, count, v, ep, fk, dp, st, dp, true, low_st);
      add_rows<A>(z, nullptr, fk, count, dp, low_z);
    }
  }
  fence();
}

/// dk and dv over the segment. Causal: from the last tile to the first, `dstate` is that after the
/// segment and leaves as that before it.
template <class T, int64_t fixed>
static void gradients(const Linear& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T, fixed>;
  const auto s = S::at(a, task);
  const auto slope = Slope<A>::of(a.map);
  const int64_t d = fixed ? fixed : a.d, e = fixed ? fixed : a.e;
  const int64_t dp = padded<A>(d), ep = padded<A>(e);
  Arena<A> arena{static_cast<A*>(scratch)};
  const int64_t tp = padded<A>(a.tile), tiles = ceiling(s.to - s.from, a.tile);
  A *fq = arena.take(a.tile * dp), *fk = arena.take(a.tile * dp);
  A *v = arena.take(a.tile * ep), *g = arena.take(a.tile * ep);
  A *df = arena.take(a.tile * dp), *dv = arena.take(a.tile * ep);
  A *dst = arena.take(e * dp), *fkt = arena.take(tp * d), *vt = arena.take(tp * e);
  A* p = arena.take(a.tile * tp);
  A *dsum = static_cast<A*>(dstate), *dz = dsum + d * ep;
  A *low = nullptr, *low_st = nullptr, *low_z = nullptr;
  if (a.causal)
    low = lost(a, arena, d * ep), low_st = lost(a, arena, e * dp), low_z = lost(a, arena, dp);
  transpose(d, e, dsum, ep, dst, dp);  // (Dv, Dp)
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t t = s.from + tile * a.tile, count = t + a.tile < s.to ? a.tile : s.to - t;
    S::features(a.k, s, a.mask, t, count, fk);
    S::values(a.v, s, a.mask, t, count, v);
    gemm(count, ep, d, fk, dp, dsum, ep, dv, ep, false);
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(df + i * dp, dz, dp * sizeof(A));
    gemm(count, dp, e, v, ep, dst, dp, df, dp, true);
    if (a.causal) {
      transpose(count, d, fk, dp, fkt, padded<A>(count));
      transpose(count, e, v, ep, vt, padded<A>(count));
    }
    for (int64_t head = 0; a.causal && head < a.group; ++head) {
      const auto x = S::of_queries(s, head);
      const A *notes = noted(x, t), *r = notes + a.n;
      S::features(a.q, x, nullptr, t, count, fq);
      drop_queries(x, t, count, fq);
      cotangents<T, fixed>(x, t, count, notes, g);
      triangle<A>(count, d, fq, dp, fkt, nullptr, p);
      triangle_times<true>(count, ep, p, g, dv);
      triangle<A>(count, e, g, ep, vt, r, p);
      triangle_times<true>(count, dp, p, fq, df);
      gemm<true>(d, ep, count, fq, dp, g, ep, dsum, ep, true, low);
      gemm<true>(e, dp, count, g, ep, fq, dp, dst, dp, true, low_st);
      add_rows<A>(dz, r, fq, count, dp, low_z);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (a.mask != nullptr && !a.mask[s.b * a.n + t + i]) clear(df + i * dp, dp);
      write_gradient(S::row(a.dk, s, t + i), d, df + i * dp, fk + i * dp, slope, a.stream);
      write_row(S::row(a.dv, s, t + i), e, dv + i * ep, A(1), a.stream);
    }
  }
  fence();
}

}  // namespace tab::TAB_ISA
