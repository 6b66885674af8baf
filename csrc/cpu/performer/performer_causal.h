// FAVOR+ attention, causal. Included by performer_kernel.h, once per instruction set.
//
// Sums run over tiles, with the quadratic form inside a tile. One shift serves a whole tile: what its
// first token sees. So no shift knows a later key, and a later key changes nothing earlier, not even
// the rounding. A tile ends before a key of it rises by SPREAD over that shift: features of keys are
// at most e^SPREAD. After the tile its maximum becomes the shift of the state. The gradient runs
// backwards in the same way, its shift the maximum of w_m·q̂_i - lse_i over the queries behind; the
// keys' features e^(a_jm + shift) are then at most 1, because a_jm + w_m·q̂_i ≤ lse_i whenever i sees
// j.
//
// The heads of q that share one of k and v go through a tile together, one behind the other in
// scratch: they read one state, and add to one gradient of it, at one shift.

namespace tab::TAB_ISA {

/// Whether any of `count` tokens lies more than SPREAD above `shift`.
template <class A>
TAB_INLINE bool rises(int64_t count, const A* x, const A* off, const Vec<A>* shift) {
  constexpr A SPREAD = 30;
  Vec<A> top[2] = {shift[0], shift[1]};
  raise(count, x, off, top);
  return any<A>(top[0] - shift[0] > SPREAD) || any<A>(top[1] - shift[1] > SPREAD);
}

/// How many of the tile's n tokens, from its first on (from its last, `reverse`), share one shift:
/// those before the first that rises above it. That depends on no token behind them. The tiles x (Mp,
/// tile) and off (tile) of `heads` heads lie one behind the other.
template <class T, class A = acc_t<T>>
static int64_t sharing(const Segment<T>& s, int64_t n, int64_t heads, const A* x, const A* off,
                       const A* c, bool reverse) {
  const int64_t edge = reverse ? n - 1 : 0, tile = s.a.tile;
  int64_t count = n;
  for (int64_t p = 0; s.a.kernel == 0 && count > 1 && p < s.mp / P<A>; ++p) {
    Vec<A> first[2] = {load(c + p * P<A>), load(c + p * P<A> + W<A>)};
    for (int64_t h = 0; h < heads; ++h)
      raise(1, x + h * tile * s.mp + p * P<A> * tile + edge * P<A>, off + h * tile + edge, first);
    for (int64_t h = 0; h < heads; ++h) {
      const A *panel = x + h * tile * s.mp + p * P<A> * tile, *own = off + h * tile;
      const int64_t begin = reverse ? n - count : 0;
      if (!rises(count, panel + begin * P<A>, own + begin, first)) continue;
      int64_t calm = 1;
      for (; calm < count; ++calm) {
        const int64_t i = reverse ? edge - calm : calm;
        if (rises(1, panel + i * P<A>, own + i, first)) break;
      }
      count = calm;
    }
  }
  return count;
}

/// Panel p of a state to the shift of the tile, which is what its first token sees (`edge`; the
/// last in a gradient). `top` is that of the state after the tile. x: its panel of the first head.
template <class T, class A = acc_t<T>>
TAB_INLINE void advance(const Segment<T>& s, int64_t p, int64_t count, int64_t edge, int64_t heads,
                        const A* x, const A* off, const State<A>& t, Vec<A>* shift, Vec<A>* top) {
  const int64_t tile = s.a.tile;
  shift[0] = load(t.c + p * P<A>), shift[1] = load(t.c + p * P<A> + W<A>);
  if (s.a.kernel == 0) {
    for (int64_t h = 0; h < heads; ++h)
      raise(1, x + h * tile * s.mp + edge * P<A>, off + h * tile + edge, shift);
    rescale(t, p, s.ep, shift);
  }
  top[0] = shift[0], top[1] = shift[1];
  for (int64_t h = 0; s.a.kernel == 0 && h < heads; ++h)
    raise(count, x + h * tile * s.mp, off + h * tile, top);
}

/// y += P·x, or Pᵀ·x, for the lower triangle P (count, count).
template <bool transposed, class A>
TAB_INLINE void add_lower(int64_t count, int64_t width, const A* p, const A* x, A* y) {
  const int64_t tp = padded<A>(count);
  if (all_finite(x, count * width))
    gemm<transposed>(count, width, count, p, tp, x, width, y, width, true);
  else
    lower_times<transposed>(count, width, p, tp, x, y);
}

/// Zero right of the diagonal of p (count, Tp); what stands left of it += r, one number a row.
template <class A>
TAB_INLINE void lower(int64_t count, A* p, const A* r) {
  const int64_t tp = padded<A>(count);
  for (int64_t i = 0; i < count; ++i) {
    if (r != nullptr)
      for (int64_t j = 0; j <= i; ++j) p[i * tp + j] += r[i];
    clear(p + i * tp + i + 1, tp - i - 1);
  }
}

/// o and lse over the segment; the state is that before it and leaves as that after it.
template <class T>
static void causal_outputs(const Performer& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const int64_t panels = s.mp / P<A>, size = P<A> * a.tile, all = a.group * a.tile;
  const int64_t square = a.tile * padded<A>(a.tile);
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto t = State<A>::sum(state, s.mp, s.ep, a.compensated, arena);
  A *q = arena.take(all * s.dp), *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep);
  A *o = arena.take(all * s.ep), *xq = arena.take(all * s.mp), *xk = arena.take(a.tile * s.mp);
  A *kt = arena.take(P<A> * padded<A>(a.tile)), *pairs = arena.take(a.group * square);
  A *off = arena.take(a.tile), *one = arena.take(a.tile), *r = arena.take(all);
  A *top = arena.take(all * W<A>), *den = arena.take(all * W<A>);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  int64_t count;
  for (int64_t i = s.from; i < s.to; i += count) {
    count = S::count(s, i);
    S::load_keys(s, i, count, k, v, off);
    for (int64_t p = 0; p < panels; ++p) exponents(s, p, count, k, xk + p * size);
    count = sharing(s, count, 1, xk, off, t.c, false);
    const int64_t tp = padded<A>(count);
    for (int64_t h = 0; h < a.group; ++h)
      S::load(S::of_queries(s, h), a.q, i, count, a.d, q + h * a.tile * s.dp);
    for (int64_t j = 0; j < all * W<A>; ++j) top[j] = -INF<A>, den[j] = 0;
    for (int64_t p = 0; p < panels; ++p)  // r_i: over features, with what query i may know
      for (int64_t h = 0; h < a.group; ++h) {
        A *b = xq + h * a.tile * s.mp + p * size, *most = top + h * a.tile * W<A>;
        exponents(s, p, count, q + h * a.tile * s.dp, b);
        const A* e = xk + p * size;
        Vec<A> known[2] = {load(t.c + p * P<A>), load(t.c + p * P<A> + W<A>)};
        for (int64_t j = 0; j < count; ++j, b += P<A>, e += P<A>, most += W<A>) {
          raise(1, e, off + j, known);
          store(most,
                maximum<A>(maximum<A>(load(b) + known[0], load(b + W<A>) + known[1]), load(most)));
        }
      }
    for (int64_t j = 0; j < all; ++j) {
      r[j] = a.kernel == 0 ? highest<A>(load(top + j * W<A>)) : A(0);
      r[j] = r[j] == -INF<A> ? A(0) : r[j];
    }
    for (int64_t p = 0; p < panels; ++p) {
      A* e = xk + p * size;
      Vec<A> c[2], after[2];
      advance(s, p, count, 0, 1, e, off, t, c, after);
      const Vec<A> below[2] = {-finite<A>(c[0]), -finite<A>(c[1])};
      features(a.kernel, count, e, below, off);
      transpose(count, P<A>, e, P<A>, kt, tp);
      const Vec<A> z0 = load(t.z + p * P<A>), z1 = load(t.z + p * P<A> + W<A>);
      for (int64_t h = 0; h < a.group; ++h) {
        A *b = xq + h * a.tile * s.mp + p * size, *total = den + h * a.tile * W<A>;
        features(a.kernel, count, b, c, r + h * a.tile);
        for (int64_t j = 0; j < count; ++j)
          store(total + j * W<A>,
                load(total + j * W<A>) + load(b + j * P<A>) * z0 + load(b + j * P<A> + W<A>) * z1);
        gemm(count, s.ep, P<A>, b, P<A>, t.s + p * P<A> * s.ep, s.ep, o + h * a.tile * s.ep, s.ep,
             p != 0);
        gemm(count, tp, P<A>, b, P<A>, kt, tp, pairs + h * square, tp, p != 0);
      }
      accumulate_panel(t, p, s.ep, count, e, v, one);
      if (a.kernel == 0) rescale(t, p, s.ep, after);
    }
    for (int64_t h = 0; h < a.group; ++h) {
      A *own = pairs + h * square, *y = o + h * a.tile * s.ep;
      lower<A>(count, own, nullptr);
      add_lower<false>(count, s.ep, own, v, y);
      for (int64_t j = 0; j < count; ++j) {
        Vec<A> seen = load(den + (h * a.tile + j) * W<A>);
        for (int64_t m = 0; m < tp; m += W<A>) seen += load(own + j * tp + m);
        finish(S::of_queries(s, h), i + j, y + j * s.ep, sum<A>(seen), r[h * a.tile + j]);
      }
    }
  }
}

}  // namespace tab::TAB_ISA
