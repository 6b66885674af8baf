// FAVOR+ attention, causal, the backward pass (the shifts: performer_causal.h). Included by
// performer_kernel.h, once per instruction set.

namespace tab::TAB_ISA {

/// dstate += Σ φ(q) (do, r) over the segment, at its running maximum of w_m·q̂_i - lse_i.
template <class T>
static void reads(const Performer& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto dt = State<A>::sum(dstate, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(a.tile * s.dp), *g = arena.take(a.tile * s.ep), *x = arena.take(a.tile * P<A>);
  A *r = arena.take(a.tile), *lse = arena.take(a.tile), *o = arena.take(s.ep);
  for (int64_t i = s.from; i < s.to; i += a.tile) {
    const int64_t count = S::count(s, i);
    S::load_queries(s, i, count, q, g, o, r, lse);
    absorb(s, count, q, lse, g, r, dt, x);
  }
}

/// pairs (count, Tp) = tril(g·vᵀ + r), with vt as scratch.
template <class T, class A = acc_t<T>>
TAB_INLINE void cotangent_pairs(const Segment<T>& s, int64_t count, const A* g, const A* r,
                                const A* v, A* vt, A* pairs) {
  const int64_t tp = padded<A>(count);
  transpose(count, s.a.e, v, s.ep, vt, tp);
  gemm(count, tp, s.a.e, g, s.ep, vt, tp, pairs, tp, false);
  lower(count, pairs, r);
}

/// dq over the segment; the state is that before it and leaves as that after it.
template <class T>
static void causal_queries(const Performer& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const int64_t panels = s.mp / P<A>, size = P<A> * a.tile;
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto t = State<A>::sum(state, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(a.tile * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *g = arena.take(a.tile * s.ep), *dq = arena.take(a.tile * s.dp);
  A *xk = arena.take(a.tile * s.mp), *xq = arena.take(size), *y = arena.take(size);
  A *vt = arena.take(a.e * padded<A>(a.tile)), *st = arena.take(a.e * P<A>);
  A *pairs = arena.take(a.tile * padded<A>(a.tile)), *off = arena.take(a.tile);
  A *one = arena.take(a.tile), *r = arena.take(a.tile), *o = arena.take(s.ep);
  A* lse = arena.take(a.tile);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  int64_t count;
  for (int64_t i = s.from; i < s.to; i += count) {
    count = S::count(s, i);
    S::load_queries(s, i, count, q, g, o, r, lse);
    S::load_keys(s, i, count, k, v, off);
    for (int64_t p = 0; p < panels; ++p) exponents(s, p, count, k, xk + p * size);
    count = sharing(s, count, xk, off, t.c, false);
    cotangent_pairs(s, count, g, r, v, vt, pairs);
    for (int64_t p = 0; p < panels; ++p) {
      A* e = xk + p * size;
      Vec<A> c[2], top[2];
      exponents(s, p, count, q, xq);
      advance(s, p, count, 0, e, off, t, c, top);
      features(a.kernel, count, xq, c, lse);
      c[0] = -finite<A>(c[0]), c[1] = -finite<A>(c[1]);
      features(a.kernel, count, e, c, off);
      transpose(P<A>, a.e, t.s + p * P<A> * s.ep, s.ep, st, P<A>);
      gemm_panel<false, 2>(count, a.e, g, s.ep, st, P<A>, y, P<A>, false);
      add_lower<false>(count, P<A>, pairs, e, y);
      slopes(a.kernel, count, y, r, t.z + p * P<A>, xq, lse);
      const A* w = static_cast<const A*>(a.rows) + p * P<A> * s.dp;
      gemm(count, s.dp, P<A>, y, P<A>, w, s.dp, dq, s.dp, p != 0);
      accumulate_panel(t, p, s.ep, count, e, v, one);
      if (a.kernel == 0) rescale(t, p, s.ep, top);
    }
    for (int64_t j = 0; j < count; ++j) store_row(S::row(s, a.dq, i + j), a.d, dq + j * s.dp, A(1));
  }
}

/// dk and dv over the segment, from its last tile to its first; dstate is that behind the segment
/// and leaves as that before it.
template <class T>
static void causal_gradients(const Performer& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const int64_t panels = s.mp / P<A>, size = P<A> * a.tile;
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto dt = State<A>::sum(dstate, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(a.tile * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *all_g = arena.take(a.tile * s.ep), *dk = arena.take(a.tile * s.dp);
  A *dv = arena.take(a.tile * s.ep), *xq = arena.take(a.tile * s.mp), *x = arena.take(size);
  A *y = arena.take(size), *vt = arena.take(a.e * padded<A>(a.tile));
  A *kt = arena.take(P<A> * padded<A>(a.tile)), *st = arena.take(a.e * P<A>);
  A* pairs = arena.take(a.tile * padded<A>(a.tile));
  A* cotangents = arena.take(a.tile * padded<A>(a.tile));
  A *off = arena.take(a.tile), *one = arena.take(a.tile), *all_r = arena.take(a.tile);
  A *o = arena.take(s.ep), *total = arena.take(a.tile * W<A>), *all_lse = arena.take(a.tile);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  int64_t count;
  for (int64_t end = s.to; end > s.from; end -= count) {
    const int64_t n = end - s.from < a.tile ? end - s.from : a.tile;
    S::load_queries(s, end - n, n, q, all_g, o, all_r, all_lse);
    for (int64_t p = 0; p < panels; ++p) exponents(s, p, n, q, xq + p * size);
    count = sharing(s, n, xq, all_lse, dt.c, true);
    const int64_t i = end - count, skip = n - count, tp = padded<A>(count);
    const A *g = all_g + skip * s.ep, *r = all_r + skip, *lse = all_lse + skip;
    S::load_keys(s, i, count, k, v, off);
    cotangent_pairs(s, count, g, r, v, vt, cotangents);
    for (int64_t p = 0; p < panels; ++p) {
      A* b = xq + p * size + skip * P<A>;
      Vec<A> c[2], top[2];
      exponents(s, p, count, k, x);
      advance(s, p, count, count - 1, b, lse, dt, c, top);
      features(a.kernel, count, x, c, off);
      c[0] = -finite<A>(c[0]), c[1] = -finite<A>(c[1]);
      features(a.kernel, count, b, c, lse);
      transpose(count, P<A>, x, P<A>, kt, tp);
      gemm(count, tp, P<A>, b, P<A>, kt, tp, pairs, tp, p != 0);
      gemm(count, s.ep, P<A>, x, P<A>, dt.s + p * P<A> * s.ep, s.ep, dv, s.ep, p != 0);
      transpose(P<A>, a.e, dt.s + p * P<A> * s.ep, s.ep, st, P<A>);
      gemm_panel<false, 2>(count, a.e, v, s.ep, st, P<A>, y, P<A>, false);
      add_lower<true>(count, P<A>, cotangents, b, y);
      slopes(a.kernel, count, y, one, dt.z + p * P<A>, x, off);
      key_panel(s, p, count, y, dk, total);
      accumulate_panel(dt, p, s.ep, count, b, g, r);
      if (a.kernel == 0) rescale(dt, p, s.ep, top);
    }
    lower<A>(count, pairs, nullptr);
    add_lower<true>(count, s.ep, pairs, g, dv);
    store_keys(s, i, count, k, dk, dv, total);
  }
}

}  // namespace tab::TAB_ISA
