// One strip backward (the scheme: softmax.h). Included once per instruction set, after
// softmax_kernel.h.
//
//     P = exp(S - L),  Δ = Σ dO∘O - dL,  dV = PᵀdO,  dS = scale·P∘(dO Vᵀ - Δ),  dQ = dS K,  dK = dSᵀQ
//
// Dao 2023, "FlashAttention-2", algorithm 2, with everything transposed: Pᵀ and dSᵀ (keys, queries).
// dQ is whole after a strip. dK and dV are added up over the strips of a task, one after the other,
// in memory that belongs to the task, so the result does not depend on who runs when.

namespace tab::TAB_ISA {

/// sums of the keys (rows of ld) += p (keys, BACKWARD) · x (count, width). A tile of keys skips the
/// queries at both ends that do not see it.
template <class T, class Rule>
static void add_to_keys(const Keys<T>& s, const Rule& rule, int64_t i0, int64_t count,
                        int64_t width, const acc_t<T>* p, const acc_t<T>* x, acc_t<T>* sums,
                        int64_t ld, int64_t first) {
  using A = acc_t<T>;
  for (int64_t i = 0; i < s.stretches; ++i) {
    const Stretch& t = s.stretch[i];
    for (int64_t r = 0; r < t.count; r += TAB_TILE_ROWS) {
      const int64_t rows = r + TAB_TILE_ROWS < t.count ? TAB_TILE_ROWS : t.count - r;
      int64_t from = rule.seen_from(t.first + r) - i0,
              to = rule.seen_to(t.first + r + rows - 1) - i0;
      from = from > 0 ? from : 0, to = to < count ? to : count;
      Ahead::ask(s.ahead, LINES);
      if (from < to)
        gemm(rows, width, to - from, p + (t.at + r) * BACKWARD<A> + from, BACKWARD<A>,
             x + from * width, width, sums + (t.first + r - first) * ld, ld, true);
    }
  }
}

/// p = 2^(s - l) where seen, else 0; ds = scale·p∘(ds - Δ). In place, for one panel.
template <class A, class Rule>
static void differentiate(const Rule& rule, const Run* run, const Run* end, A scale, const A* l,
                          const A* delta, A* s, A* ds) {
  const Vec<A> l0 = load(l), l1 = load(l + W<A>), d0 = load(delta), d1 = load(delta + W<A>);
  for (; run < end; ++run)
    for (int64_t j = run->first; j < run->first + run->count;
         ++j, s += BACKWARD<A>, ds += BACKWARD<A>) {
      if (!rule.reaches(*run, j)) {
        clear(s, Q<A>);
        clear(ds, Q<A>);
        continue;
      }
      Vec<A> p0 = exp2<A>(load(s) - l0), p1 = exp2<A>(load(s + W<A>) - l1);
      Vec<A> ds0 = p0 * (load(ds) - d0) * scale, ds1 = p1 * (load(ds + W<A>) - d1) * scale;
      if (!rule.whole(*run, j)) {
        const Int<A> seen0 = Rule::seen(rule, *run, j, 0), seen1 = Rule::seen(rule, *run, j, 1);
        p0 = seen0 ? p0 : Vec<A>{}, p1 = seen1 ? p1 : Vec<A>{};
        ds0 = seen0 ? ds0 : Vec<A>{}, ds1 = seen1 ? ds1 : Vec<A>{};
      }
      store(s, p0);
      store(s + W<A>, p1);
      store(ds, ds0);
      store(ds + W<A>, ds1);
    }
}

/// dq of the queries i0 … of one head; their part of dK and dV goes into `sums`. A q or do that is
/// not finite must reach no key beyond its window, nor such a key dq: then pair by pair.
template <class T, class Rule, class Args>
static void strip_backward(const Args& a, int64_t head, int64_t i0, const Run* first,
                           const Run* end, Stretch* stretch, const Sums& sums, Ahead& ahead,
                           Arena<acc_t<T>> arena) {
  using A = acc_t<T>;
  constexpr int64_t wide = BACKWARD<A>;
  const int64_t b = head / a.h, h = head % a.h, dp = padded<A>(a.d), ep = padded<A>(a.e);
  const int64_t count = least(wide, a.n - i0);
  A *qt = arena.take(a.d * wide), *q = arena.take(wide * dp), *dq = arena.take(wide * dp);
  A *gt = arena.take(a.e * wide), *g = arena.take(wide * ep), *o = arena.take(ep);
  A *s = arena.take(a.chunk * wide), *ds = arena.take(a.chunk * wide);
  A *k = nullptr, *v = nullptr, *steep = nullptr;
  if (a.softcap > 0) steep = arena.take(a.chunk * wide);
  if (a.copy) k = arena.take(a.chunk * dp), v = arena.take(a.chunk * ep);
  Keys<T> keys{a, b, h / a.group, k, v, stretch, ahead};
  A l[wide], delta[wide];

  load_rows<T>(row<T>(a.q, b, h, i0), a.q.n, count, a.d, q);
  load_rows<T>(row<T>(a.grad, b, h, i0), a.grad.n, count, a.e, g);
  if (a.mask != nullptr) quiet_queries(a, b, i0, count, dp, q);
  turn(count, a.d, q, product_scale<A>(a), qt, wide);
  turn(count, a.e, g, A(1), gt, wide);
  clear(l, wide);
  clear(delta, wide);
  const bool finite_queries = all_finite(q, count * dp) && all_finite(g, count * ep);
  const A* lse = static_cast<A*>(a.lse) + head * a.row + i0;
  const A* dlse = beside(static_cast<const A*>(a.dlse), head * a.row + i0);
  for (int64_t i = 0; i < count; ++i) {
    prefetch_row(row<T>(a.o, b, h, i0 + i + AHEAD), a.e);
    prefetch_row(row<T>(a.dq, b, h, i0 + i), a.d);  // to be written
    load_row(row<T>(a.o, b, h, i0 + i), a.e, o);
    delta[i] = dot(g + i * ep, o, ep) - (dlse == nullptr ? A(0) : dlse[i]);
    l[i] = lse[i] == -__builtin_inf() ? A(0) : lse[i] * LOG2E<A>;
  }
  A *dk = static_cast<A*>(sums.dk), *dv = static_cast<A*>(sums.dv);
  const Rule strip = Rule::at(a, i0, i0);
  for (bool again = false;; again = true) {  // the second time for dq alone
    clear(dq, count * dp);
    for (const Run *begin = first, *run; begin < end; begin = run) {
      run = Keys<T>::next(keys, begin, end);
      for (int64_t at = 0; at < count; at += Q<A>) {
        const Rule rule = Rule::at(a, i0 + at, i0);
        A *sp = s + at, *dsp = ds + at, *steepp = beside(steep, at);
        keys_times<T>(keys, rule, false, qt + at, sp, wide);
        keys_times<T>(keys, rule, true, gt + at, dsp, wide);
        if (adjusts(a))
          adjust<A>(a, b, h, i0 + at, stretch, stretch + keys.stretches, wide, sp, dsp, steepp);
        differentiate(rule, begin, run, A(a.scale), l + at, delta + at, sp, dsp);
        if (steep) flatten(keys.size, wide, steepp, dsp);
        A* dqp = dq + at * dp;
        if (again)
          pair_by_pair<false>(keys, rule, begin, run, false, dsp, wide, dsp, dqp, dp, 0);
        else
          times_keys<T>(keys, rule, false, dsp, wide, dqp);
        if (again || finite_queries) continue;
        const A *gp = g + at * ep, *qp = q + at * dp;
        pair_by_pair<true>(keys, rule, begin, run, true, sp, wide, gp, dv, sums.ldv, sums.first);
        pair_by_pair<true>(keys, rule, begin, run, false, dsp, wide, qp, dk, sums.ldk, sums.first);
      }
      if (again || !finite_queries) continue;
      add_to_keys<T>(keys, strip, i0, count, ep, s, g, dv, sums.ldv, sums.first);
      add_to_keys<T>(keys, strip, i0, count, dp, ds, q, dk, sums.ldk, sums.first);
    }
    if (again || all_finite(dq, count * dp)) break;
  }
  for (int64_t i = 0; i < count; ++i) store_row(row<T>(a.dq, b, h, i0 + i), a.d, dq + i * dp, A(1));
}

template <class T>
static void add_parts(const Rows& out, int64_t width, const Softmax& a, int64_t head, int64_t j,
                      bool values, const Sums* parts, int64_t count, acc_t<T>* total) {
  using A = acc_t<T>;
  clear(total, padded<A>(width));
  for (const Sums* p = parts; p < parts + count; ++p)
    if (p->first <= j && j < p->last) {
      const A* sums = static_cast<const A*>(values ? p->dv : p->dk);
      add_scaled(total, A(1), sums + (j - p->first) * padded<A>(width), padded<A>(width));
    }
  prefetch_row(row<T>(out, head / a.kv, head % a.kv, j + AHEAD), width);  // to be written
  store_row(row<T>(out, head / a.kv, head % a.kv, j), width, total, A(1));
}

/// dk and dv of the keys j0 … j1 of one head of theirs: the sums of all parts that hold them, in order.
template <class T, class Args>
static void finish(const Args& a, int64_t head, int64_t j0, int64_t j1, const Sums* parts,
                   int64_t count, void* scratch) {
  acc_t<T>* total = static_cast<acc_t<T>*>(scratch);
  for (int64_t j = j0; j < j1; ++j) {
    add_parts<T>(a.dk, a.d, a, head, j, false, parts, count, total);
    add_parts<T>(a.dv, a.e, a, head, j, true, parts, count, total);
  }
}

}  // namespace tab::TAB_ISA
