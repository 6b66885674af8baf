// Gated linear attention, the backward pass (formulas: gated_linear.cpp). Included by
// gated_linear_kernel.h, once per instruction set.

namespace tab::TAB_ISA {

/// q = 0 where a token is masked and its output has no cotangent: whatever its q holds, nobody
/// learns of it.
template <class T, class A = acc_t<T>>
static void drop_queries(const Segment<T>& s, int64_t t, int64_t count, A* q) {
  for (int64_t i = 0; i < count; ++i)
    if (Segment<T>::masked(s, t + i) && all_zero(row<T>(s.a.grad, s.b, s.h, t + i), s.a.e))
      clear(q + i * s.dp, s.dp);
}

/// What the queries of the segment add to the gradient of the state before it, and the decay of its
/// tokens.
template <class T>
static void reads(const Gated& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *q = arena.take(a.tile * s.dp), *g = arena.take(a.tile * s.ep), *sum = static_cast<A*>(dstate);
  auto decay = Decays<A>::take(arena, s.tp);
  A *low = lost(a, arena, a.d * s.ep), logs = 0;
  const int64_t tiles = ceiling(s.to - s.from, a.tile);
  for (int64_t i = tiles - 1; i >= 0; --i) {
    const int64_t t = s.from + i * a.tile, count = least(a.tile, s.to - t);
    decays(s, t, count, decay);
    for (int64_t head = 0; head < a.group; ++head) {
      const auto x = S::of_queries(s, head);
      S::queries(x, t, count, q);
      S::load(x, a.grad, false, t, count, a.e, g);
      drop_queries(x, t, count, q);
      scale_rows(q, decay.until, count, s.dp);
      step(a.d, s.ep, count, head == 0 ? decay.total : A(1), q, s.dp, g, sum, low);
    }
    logs += decay.log_total;
  }
  leave_decay(s, logs, sum, decay.own);
}

/// dq, dk, dv and dg over the segment, from its last tile to the first: `dstate` is that after the
/// segment and leaves as that before it; the states before the tiles are those that `keys` kept.
template <class T>
static void gradients(const Gated& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const int64_t size = a.d * s.ep, wide = s.dp > s.ep ? s.dp : s.ep;
  Arena<A> arena{static_cast<A*>(scratch)};
  A *q = arena.take(a.tile * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *g = arena.take(a.tile * s.ep), *dq = arena.take(a.tile * s.dp),
    *dk = arena.take(a.tile * s.dp), *dv = arena.take(a.tile * s.ep);
  A *turned = arena.take(wide * (s.tp > wide ? s.tp : wide)), *dst = arena.take(a.e * s.dp);
  A *p = arena.take(a.tile * s.tp), *dp = arena.take(a.tile * s.tp), *e = arena.take(s.tp);
  A *read = arena.take(s.tp), *pairs = arena.take(s.tp), *dsum = static_cast<A*>(dstate);
  auto decay = Decays<A>::take(arena, s.tp);
  A *low = lost(a, arena, size), *low_t = lost(a, arena, a.e * s.dp);
  transpose(a.d, a.e, dsum, s.ep, dst, s.dp);  // (Dv, Dp)
  const int64_t tiles = ceiling(s.to - s.from, a.tile);
  for (int64_t tile = tiles - 1; tile >= 0; --tile) {
    const int64_t t = s.from + tile * a.tile, count = least(a.tile, s.to - t);
    const int64_t tp = padded<A>(count);
    const A* state = static_cast<const A*>(a.kept) + S::tile(s, t) * size;
    S::load(s, a.k, true, t, count, a.d, k);
    S::load(s, a.v, true, t, count, a.e, v);
    decays(s, t, count, decay);

    // What later tiles read of the keys: dv, dk, and of dg_t the pairs j < t ≤ i of which i is there.
    gemm(count, s.ep, a.d, k, s.dp, dsum, s.ep, dv, s.ep, false);
    scale_rows(dv, decay.after, count, s.ep);
    gemm(count, s.dp, a.e, v, s.ep, dst, s.dp, dk, s.dp, false);
    scale_rows(dk, decay.after, count, s.dp);
    A through = decay.total * dot(state, dsum, size);
    A* dg = row<A>(a.dg, s.b, s.h, t);
    for (int64_t i = 0; i < count; ++i) {
      dg[i * a.dg.n] = through;
      through += dot(k + i * s.dp, dk + i * s.dp, s.dp);
    }

    for (int64_t head = 0; head < a.group; ++head) {
      const auto x = S::of_queries(s, head);
      S::queries(x, t, count, q);
      S::load(x, a.grad, false, t, count, a.e, g);
      drop_queries(x, t, count, q);

      // Pairs within the tile.
      transpose(count, a.d, k, s.dp, turned, tp);
      triangle<A>(count, a.d, q, s.dp, turned, nullptr, p);
      decay_pairs(count, decay.own, p, e);
      transpose(count, a.e, v, s.ep, turned, tp);
      triangle<A>(count, a.e, g, s.ep, turned, nullptr, dp);
      pair_gradients(count, dp, p, pairs, e);
      decay_pairs(count, decay.own, dp, e);

      // dq: what the queries read of the state before the tile, and of its pairs.
      transpose(a.d, a.e, state, s.ep, turned, s.dp);
      gemm(count, s.dp, a.e, g, s.ep, turned, s.dp, dq, s.dp, false);
      scale_rows(dq, decay.until, count, s.dp);
      for (int64_t i = 0; i < count; ++i) read[i] = dot(q + i * s.dp, dq + i * s.dp, s.dp);
      triangle_times<false>(count, s.dp, dp, k, dq);
      for (int64_t i = 0; i < count; ++i)
        write_row(row<T>(a.dq, s.b, x.h, t + i), a.d, dq + i * s.dp, static_cast<A>(a.scale),
                  a.stream);
      triangle_times<true>(count, s.ep, p, g, dv);
      triangle_times<true>(count, s.dp, dp, q, dk);

      // dg_t: the pairs of which i is in the tile, and j, too, or not.
      A later = 0;
      for (int64_t i = count - 1; i >= 0; --i) dg[i * a.dg.n] += pairs[i] + (later += read[i]);
      scale_rows(q, decay.until, count, s.dp);
      const A total = head == 0 ? decay.total : A(1);
      step(a.d, s.ep, count, total, q, s.dp, g, dsum, low);
      step(a.e, s.dp, count, total, g, s.ep, q, dst, low_t);
    }
    for (int64_t i = 0; i < count; ++i) {
      if (S::masked(s, t + i)) dg[i * a.dg.n] = 0, clear(dk + i * s.dp, s.dp);
      write_row(row<T>(a.dk, s.b, s.h, t + i), a.d, dk + i * s.dp, A(1), a.stream);
      write_row(row<T>(a.dv, s.b, s.h, t + i), a.e, dv + i * s.ep, A(1), a.stream);
    }
  }
  fence();
}

}  // namespace tab::TAB_ISA
