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
  for (int64_t h = 0; h < a.group; ++h)
    for (int64_t i = s.from; i < s.to; i += a.tile) {
      const int64_t count = S::count(s, i);
      S::load_queries(S::of_queries(s, h), i, count, q, g, o, r, lse);
      absorb(s, count, q, lse, g, r, dt, x);
    }
}

/// pairs (count, Tp) = tril(g·vᵀ + r) of every head of the group, with vt as scratch.
template <class T, class A = acc_t<T>>
TAB_INLINE void cotangent_pairs(const Segment<T>& s, int64_t count, const A* g, const A* r,
                                const A* v, A* vt, A* pairs) {
  const int64_t tp = padded<A>(count), tile = s.a.tile;
  transpose(count, s.a.e, v, s.ep, vt, tp);
  for (int64_t h = 0; h < s.a.group; ++h) {
    A* own = pairs + h * tile * padded<A>(tile);
    gemm(count, tp, s.a.e, g + h * tile * s.ep, s.ep, vt, tp, own, tp, false);
    lower(count, own, r + h * tile);
  }
}

/// load_queries of every head of the group, tile behind tile.
template <class T, class A = acc_t<T>>
TAB_INLINE void load_group(const Segment<T>& s, int64_t i, int64_t count, A* q, A* g, A* o, A* r,
                           A* lse) {
  const int64_t tile = s.a.tile;
  for (int64_t h = 0; h < s.a.group; ++h)
    Segment<T>::load_queries(Segment<T>::of_queries(s, h), i, count, q + h * tile * s.dp,
                             g + h * tile * s.ep, o, r + h * tile, lse + h * tile);
}

/// dq over the segment; the state is that before it and leaves as that after it.
template <class T>
static void causal_queries(const Performer& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const int64_t panels = s.mp / P<A>, size = P<A> * a.tile, all = a.group * a.tile;
  const int64_t square = a.tile * padded<A>(a.tile);
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto t = State<A>::sum(state, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(all * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *g = arena.take(all * s.ep), *dq = arena.take(all * s.dp), *xk = arena.take(a.tile * s.mp);
  A *xq = arena.take(size), *y = arena.take(size), *vt = arena.take(a.e * padded<A>(a.tile));
  A *st = arena.take(a.e * P<A>), *pairs = arena.take(a.group * square);
  A *off = arena.take(a.tile), *one = arena.take(a.tile), *r = arena.take(all);
  A *o = arena.take(s.ep), *lse = arena.take(all);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  int64_t count;
  for (int64_t i = s.from; i < s.to; i += count) {
    count = S::count(s, i);
    S::load_keys(s, i, count, k, v, off);
    for (int64_t p = 0; p < panels; ++p) exponents(s, p, count, k, xk + p * size);
    count = sharing(s, count, 1, xk, off, t.c, false);
    load_group(s, i, count, q, g, o, r, lse);
    cotangent_pairs(s, count, g, r, v, vt, pairs);
    for (int64_t p = 0; p < panels; ++p) {
      A* e = xk + p * size;
      Vec<A> c[2], top[2];
      advance(s, p, count, 0, 1, e, off, t, c, top);
      const Vec<A> below[2] = {-finite<A>(c[0]), -finite<A>(c[1])};
      features(a.kernel, count, e, below, off);
      transpose(P<A>, a.e, t.s + p * P<A> * s.ep, s.ep, st, P<A>);
      for (int64_t h = 0; h < a.group; ++h) {
        exponents(s, p, count, q + h * a.tile * s.dp, xq);
        features(a.kernel, count, xq, c, lse + h * a.tile);
        gemm_panel<false, 2>(count, a.e, g + h * a.tile * s.ep, s.ep, st, P<A>, y, P<A>, false);
        add_lower<false>(count, P<A>, pairs + h * square, e, y);
        slopes(a.kernel, count, y, r + h * a.tile, t.z + p * P<A>, xq, lse + h * a.tile);
        const A* w = static_cast<const A*>(a.rows) + p * P<A> * s.dp;
        gemm(count, s.dp, P<A>, y, P<A>, w, s.dp, dq + h * a.tile * s.dp, s.dp, p != 0);
      }
      accumulate_panel(t, p, s.ep, count, e, v, one);
      if (a.kernel == 0) rescale(t, p, s.ep, top);
    }
    for (int64_t h = 0; h < a.group; ++h)
      for (int64_t j = 0; j < count; ++j)
        store_row(S::row(S::of_queries(s, h), a.dq, i + j), a.d, dq + (h * a.tile + j) * s.dp,
                  A(1));
  }
}

/// dk and dv over the segment, from its last tile to its first; dstate is that behind the segment
/// and leaves as that before it.
template <class T>
static void causal_gradients(const Performer& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const int64_t panels = s.mp / P<A>, size = P<A> * a.tile, all = a.group * a.tile;
  const int64_t square = a.tile * padded<A>(a.tile);
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto dt = State<A>::sum(dstate, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(all * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *all_g = arena.take(all * s.ep), *dk = arena.take(a.tile * s.dp);
  A *dv = arena.take(a.tile * s.ep), *xq = arena.take(all * s.mp), *x = arena.take(size);
  A *y = arena.take(size), *vt = arena.take(a.e * padded<A>(a.tile));
  A *kt = arena.take(P<A> * padded<A>(a.tile)), *st = arena.take(a.e * P<A>);
  A *pairs = arena.take(a.group * square), *cotangents = arena.take(a.group * square);
  A *off = arena.take(a.tile), *one = arena.take(a.tile), *all_r = arena.take(all);
  A *o = arena.take(s.ep), *total = arena.take(a.tile * W<A>), *all_lse = arena.take(all);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  int64_t count;
  for (int64_t end = s.to; end > s.from; end -= count) {
    const int64_t n = end - s.from < a.tile ? end - s.from : a.tile;
    load_group(s, end - n, n, q, all_g, o, all_r, all_lse);
    for (int64_t h = 0; h < a.group; ++h)
      for (int64_t p = 0; p < panels; ++p)
        exponents(s, p, n, q + h * a.tile * s.dp, xq + h * a.tile * s.mp + p * size);
    count = sharing(s, n, a.group, xq, all_lse, dt.c, true);
    const int64_t i = end - count, skip = n - count, tp = padded<A>(count);
    const A *g = all_g + skip * s.ep, *r = all_r + skip, *lse = all_lse + skip;
    S::load_keys(s, i, count, k, v, off);
    cotangent_pairs(s, count, g, r, v, vt, cotangents);
    for (int64_t p = 0; p < panels; ++p) {
      A* b = xq + p * size + skip * P<A>;
      Vec<A> c[2], top[2];
      exponents(s, p, count, k, x);
      advance(s, p, count, count - 1, a.group, b, lse, dt, c, top);
      features(a.kernel, count, x, c, off);
      c[0] = -finite<A>(c[0]), c[1] = -finite<A>(c[1]);
      transpose(count, P<A>, x, P<A>, kt, tp);
      gemm(count, s.ep, P<A>, x, P<A>, dt.s + p * P<A> * s.ep, s.ep, dv, s.ep, p != 0);
      transpose(P<A>, a.e, dt.s + p * P<A> * s.ep, s.ep, st, P<A>);
      gemm_panel<false, 2>(count, a.e, v, s.ep, st, P<A>, y, P<A>, false);
      for (int64_t h = 0; h < a.group; ++h) {
        A* own = b + h * a.tile * s.mp;
        features(a.kernel, count, own, c, lse + h * a.tile);
        gemm(count, tp, P<A>, own, P<A>, kt, tp, pairs + h * square, tp, p != 0);
        add_lower<true>(count, P<A>, cotangents + h * square, own, y);
      }
      slopes(a.kernel, count, y, one, dt.z + p * P<A>, x, off);
      key_panel(s, p, count, y, dk, total);
      for (int64_t h = 0; h < a.group; ++h)
        accumulate_panel(dt, p, s.ep, count, b + h * a.tile * s.mp, g + h * a.tile * s.ep,
                         r + h * a.tile);
      if (a.kernel == 0) rescale(dt, p, s.ep, top);
    }
    for (int64_t h = 0; h < a.group; ++h) {
      lower<A>(count, pairs + h * square, nullptr);
      add_lower<true>(count, s.ep, pairs + h * square, g + h * a.tile * s.ep, dv);
    }
    store_keys(s, i, count, k, dk, dv, total);
  }
}

}  // namespace tab::TAB_ISA
