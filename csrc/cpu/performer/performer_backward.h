// FAVOR+ attention, the backward pass (formulas: performer.cpp). Included by performer_kernel.h, once
// per instruction set.

namespace tab::TAB_ISA {

/// dq over the segment, and dstate += Σ φ(q) (do, r) at the state's shift; bidirectional.
template <class T>
static void queries(const Performer& a, int64_t task, void* state, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const auto t = State<A>::at(state, s.mp, s.ep);
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto dt = State<A>::sum(dstate, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(a.tile * s.dp), *dq = arena.take(a.tile * s.dp), *g = arena.take(a.tile * s.ep);
  A *x = arena.take(a.tile * P<A>), *y = arena.take(a.tile * P<A>), *st = arena.take(s.mp * a.e);
  A *r = arena.take(a.tile), *lse = arena.take(a.tile), *o = arena.take(s.ep);
  for (int64_t p = 0; p < s.mp / P<A>; ++p)
    transpose(P<A>, a.e, t.s + p * P<A> * s.ep, s.ep, st + p * P<A> * a.e, P<A>);
  for (int64_t head = 0; head < a.group; ++head) {
    const auto sq = S::of_queries(s, head);
    for (int64_t i = s.from; i < s.to; i += a.tile) {
      const int64_t count = S::count(s, i);
      S::load_queries(sq, i, count, q, g, o, r, lse);
      for (int64_t p = 0; p < s.mp / P<A>; ++p) {
        exponents(s, p, count, q, x);
        const Vec<A> c[2] = {load(t.c + p * P<A>), load(t.c + p * P<A> + W<A>)};
        features(a.kernel, count, x, c, lse);
        gemm_panel<false, 2>(count, a.e, g, s.ep, st + p * P<A> * a.e, P<A>, y, P<A>, false);
        slopes(a.kernel, count, y, r, t.z + p * P<A>, x, lse);
        accumulate_panel(dt, p, s.ep, count, x, g, r);
        const A* w = static_cast<const A*>(a.rows) + p * P<A> * s.dp;
        gemm(count, s.dp, P<A>, y, P<A>, w, s.dp, dq, s.dp, p != 0);
      }
      for (int64_t j = 0; j < count; ++j)
        store_row(S::row(sq, a.dq, i + j), a.d, dq + j * s.dp, A(1));
    }
  }
}

/// dk and dv of a tile, but for its ‖k̂‖²: da_i summed over features stands in `total`.
template <class T, class A = acc_t<T>>
TAB_INLINE void store_keys(const Segment<T>& s, int64_t i, int64_t count, const A* k, A* dk,
                           const A* dv, const A* total) {
  const Performer& a = s.a;
  for (int64_t j = 0; j < count; ++j) {
    if (a.kernel == 0)
      add_scaled(dk + j * s.dp, -sum<A>(load(total + j * W<A>)) * static_cast<A>(a.scale),
                 k + j * s.dp, s.dp);
    store_row(Segment<T>::row(s, a.dk, i + j), a.d, dk + j * s.dp, A(1));
    store_row(Segment<T>::row(s, a.dv, i + j), a.e, dv + j * s.ep, A(1));
  }
}
/// dk += da·W and total += Σ_m da_m over one panel.
template <class T, class A = acc_t<T>>
TAB_INLINE void key_panel(const Segment<T>& s, int64_t p, int64_t count, const A* da, A* dk,
                          A* total) {
  for (int64_t j = 0; j < count; ++j) {
    const Vec<A> both = load(da + j * P<A>) + load(da + j * P<A> + W<A>);
    store(total + j * W<A>, p == 0 ? both : load(total + j * W<A>) + both);
  }
  const A* w = static_cast<const A*>(s.a.rows) + p * P<A> * s.dp;
  gemm(count, s.dp, P<A>, da, P<A>, w, s.dp, dk, s.dp, p != 0);
}

/// dk and dv over the segment, given the whole dstate at the shift it carries; bidirectional.
template <class T>
static void gradients(const Performer& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const auto dt = State<A>::at(dstate, s.mp, s.ep);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *k = arena.take(a.tile * s.dp), *dk = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *dv = arena.take(a.tile * s.ep), *x = arena.take(a.tile * P<A>), *y = arena.take(a.tile * P<A>);
  A *st = arena.take(s.mp * a.e), *off = arena.take(a.tile), *one = arena.take(a.tile);
  A* total = arena.take(a.tile * W<A>);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  for (int64_t p = 0; p < s.mp / P<A>; ++p)
    transpose(P<A>, a.e, dt.s + p * P<A> * s.ep, s.ep, st + p * P<A> * a.e, P<A>);
  for (int64_t i = s.from; i < s.to; i += a.tile) {
    const int64_t count = S::count(s, i);
    S::load_keys(s, i, count, k, v, off);
    for (int64_t p = 0; p < s.mp / P<A>; ++p) {
      exponents(s, p, count, k, x);
      const Vec<A> shift[2] = {-finite<A>(load(dt.c + p * P<A>)),
                               -finite<A>(load(dt.c + p * P<A> + W<A>))};
      features(a.kernel, count, x, shift, off);
      gemm_panel<false, 2>(count, a.e, v, s.ep, st + p * P<A> * a.e, P<A>, y, P<A>, false);
      slopes(a.kernel, count, y, one, dt.z + p * P<A>, x, off);
      gemm(count, s.ep, P<A>, x, P<A>, dt.s + p * P<A> * s.ep, s.ep, dv, s.ep, p != 0);
      key_panel(s, p, count, y, dk, total);
    }
    store_keys(s, i, count, k, dk, dv, total);
  }
}

}  // namespace tab::TAB_ISA
