// Linear attention, the backward pass (formulas: linear.cpp). Included by linear_kernel.h, once per
// instruction set.

namespace tab::TAB_ISA {

/// x *= a over n padded elements.
template <class A>
TAB_INLINE void scale_row(A* x, A a, int64_t n) {
  for (int64_t j = 0; j < n; j += W<A>) store(x + j, load(x + j) * a);
}

/// g (count, Ep) = do·(1/den), 1/den as noted by `queries`.
template <class T>
TAB_INLINE void cotangents(const Segment<T>& s, int64_t t, int64_t count, const acc_t<T>* inverses,
                           acc_t<T>* g) {
  using A = acc_t<T>;
  Segment<T>::values(s.a.grad, s, t, count, g);
  for (int64_t i = 0; i < count; ++i) scale_row(g + i * s.ep, inverses[i], s.ep);
}

/// dq over the segment; dstate += Σ φ(q) gᵀ and φ(q) r unless it is null. Causal: `state` as in
/// `outputs`; notes (1/den, r) of each token for `gradients`.
template <class T>
static void queries(const Linear& a, int64_t task, void* state, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  const int64_t tp = padded<A>(a.tile);
  A *fq = arena.take(a.tile * s.dp), *fk = arena.take(a.tile * s.dp);
  A *v = arena.take(a.tile * s.ep), *g = arena.take(a.tile * s.ep);
  A *df = arena.take(a.tile * s.dp), *st = arena.take(a.e * s.dp);
  A *vt = arena.take(a.e * tp), *p = arena.take(a.tile * tp), *r = arena.take(a.tile);
  A *den = arena.take(a.tile), *seen = arena.take(s.dp);
  A *z = static_cast<A*>(state) + a.d * s.ep, *dsum = static_cast<A*>(dstate);
  transpose(a.d, a.e, static_cast<A*>(state), s.ep, st, s.dp);  // (Dv, Dp)
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
    S::features(a.q, s, nullptr, t, count, fq);
    if (a.causal) S::features(a.k, s, a.mask, t, count, fk);
    S::values(a.grad, s, t, count, g);
    __builtin_memcpy(seen, z, s.dp * sizeof(A));  // z as the first token of the tile finds it
    for (int64_t i = 0; i < count; ++i) {
      if (a.causal) add_scaled(z, A(1), fk + i * s.dp, s.dp);
      den[i] = inverse(dot(fq + i * s.dp, z, s.dp) + static_cast<A>(a.eps));
      scale_row(g + i * s.ep, den[i], s.ep);
    }
    gemm(count, s.dp, a.e, g, s.ep, st, s.dp, df, s.dp, false);
    if (a.causal) {
      S::values(a.v, s, t, count, v);
      transpose(count, a.e, v, s.ep, vt, padded<A>(count));
      triangle<A>(count, a.e, g, s.ep, vt, nullptr, p);
      triangle_times<false>(count, s.dp, p, fk, df);
      gemm<true>(a.e, s.dp, count, v, s.ep, fk, s.dp, st, s.dp, true);
    }
    for (int64_t i = 0; i < count; ++i) {  // df is S g: with φ(q) it gives g·o/inverse
      if (a.causal) add_scaled(seen, A(1), fk + i * s.dp, s.dp);
      r[i] = -den[i] * dot(fq + i * s.dp, df + i * s.dp, s.dp);
      add_scaled(df + i * s.dp, r[i], seen, s.dp);
      write_gradient(S::row(a.dq, s, t + i), a.d, df + i * s.dp, fq + i * s.dp, a.map, a.stream);
    }
    if (a.causal) {
      A* notes = static_cast<A*>(a.notes) + 2 * (s.b * a.h + s.h) * a.n + t;
      for (int64_t i = 0; i < count; ++i) notes[i] = den[i], notes[a.n + i] = r[i];
    }
    if (dstate != nullptr) {
      gemm<true>(a.d, s.ep, count, fq, s.dp, g, s.ep, dsum, s.ep, true);
      add_rows<A>(dsum + a.d * s.ep, r, fq, count, s.dp);
    }
  }
  fence();
}

/// dk and dv over the segment. Causal: from the last tile to the first, `dstate` is that after the
/// segment and leaves as that before it.
template <class T>
static void gradients(const Linear& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  const int64_t tp = padded<A>(a.tile), tiles = (s.to - s.from + a.tile - 1) / a.tile;
  A *fq = arena.take(a.tile * s.dp), *fk = arena.take(a.tile * s.dp);
  A *v = arena.take(a.tile * s.ep), *g = arena.take(a.tile * s.ep);
  A *df = arena.take(a.tile * s.dp), *dv = arena.take(a.tile * s.ep);
  A *dst = arena.take(a.e * s.dp), *turned = arena.take(tp * (a.d > a.e ? a.d : a.e));
  A *p = arena.take(a.tile * tp);
  A *dsum = static_cast<A*>(dstate), *dz = dsum + a.d * s.ep;
  transpose(a.d, a.e, dsum, s.ep, dst, s.dp);  // (Dv, Dp)
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t t = s.from + tile * a.tile, count = t + a.tile < s.to ? a.tile : s.to - t;
    S::features(a.k, s, a.mask, t, count, fk);
    S::values(a.v, s, t, count, v);
    gemm(count, s.ep, a.d, fk, s.dp, dsum, s.ep, dv, s.ep, false);
    for (int64_t i = 0; i < count; ++i) __builtin_memcpy(df + i * s.dp, dz, s.dp * sizeof(A));
    gemm(count, s.dp, a.e, v, s.ep, dst, s.dp, df, s.dp, true);
    if (a.causal) {
      const A* notes = static_cast<A*>(a.notes) + 2 * (s.b * a.h + s.h) * a.n + t;
      const A* r = notes + a.n;
      S::features(a.q, s, nullptr, t, count, fq);
      cotangents<T>(s, t, count, notes, g);
      transpose(count, a.d, fk, s.dp, turned, padded<A>(count));
      triangle<A>(count, a.d, fq, s.dp, turned, nullptr, p);
      triangle_times<true>(count, s.ep, p, g, dv);
      transpose(count, a.e, v, s.ep, turned, padded<A>(count));
      triangle<A>(count, a.e, g, s.ep, turned, r, p);
      triangle_times<true>(count, s.dp, p, fq, df);
      gemm<true>(a.d, s.ep, count, fq, s.dp, g, s.ep, dsum, s.ep, true);
      gemm<true>(a.e, s.dp, count, g, s.ep, fq, s.dp, dst, s.dp, true);
      add_rows<A>(dz, r, fq, count, s.dp);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (a.mask != nullptr && !a.mask[s.b * a.n + t + i]) clear(df + i * s.dp, s.dp);
      write_gradient(S::row(a.dk, s, t + i), a.d, df + i * s.dp, fk + i * s.dp, a.map, a.stream);
      write_row(S::row(a.dv, s, t + i), a.e, dv + i * s.ep, A(1), a.stream);
    }
  }
  fence();
}

}  // namespace tab::TAB_ISA
