// One strip forward, and what the backward pass shares with it (the scheme: softmax.h). Included once
// per instruction set.
//
//     o_i = Σ_j exp(s_ij - L_i) v_j,  s_ij = scale·q_iᵀk_j,  L_i = log Σ_j exp s_ij
//
// Dao 2023, "FlashAttention-2", algorithm 1. A Rule says which keys a query sees inside the runs:
//     from(i), to(i)           bounds of the keys that query i can see, neither falls as i grows
//     reaches(run, j)          some query of the panel may see key j
//     seen_from(j), seen_to(j) the same for the queries that can see key j
//     whole(run, j)            every query of the panel sees key j
//     seen(run, j, half)       else: which lanes of this vector of queries do
//
// The tiles of a product also hold pairs that do not see each other, at weight 0. But 0·NaN and 0·∞
// are NaN: where such a value could reach somebody, `pair_by_pair` takes the place of the tiles.

namespace tab::TAB_ISA {

/// Queries in a panel, and in a strip: forward one panel, backward several side by side (softmax.h).
template <class A>
constexpr int64_t Q = 2 * W<A>;
template <class A>
constexpr int64_t BACKWARD = 64 / TAB_VECTOR_BYTES * Q<A>;

}  // namespace tab::TAB_ISA

#include "../core/tanh.h"
#include "keys.h"
#include "scores.h"

namespace tab::TAB_ISA {

/// y (width, ld) = scale·xᵀ of x (count ≤ ld, padded width); lanes past count are 0.
template <class A>
static void turn(int64_t count, int64_t width, const A* x, A scale, A* y, int64_t ld) {
  if (count < ld) clear(y, width * ld);
  transpose(count, width, x, padded<A>(width), y, ld);
  if (scale != 1)
    for (int64_t i = 0; i < width * ld; i += W<A>) store(y + i, load(y + i) * scale);
}

// --- products with keys ---------------------------------------------------------------------------

/// y (keys, Q) = rows of K (or V) · xᵀ, given xᵀ (width, Q), both with rows ld apart. Keys at both
/// ends that no query of the panel sees are left out.
template <class T, class Rule>
static void keys_times(const Keys<T>& s, const Rule& rule, bool values, const acc_t<T>* xt,
                       acc_t<T>* y, int64_t ld) {
  using A = acc_t<T>;
  const int64_t width = values ? s.a.e : s.a.d;
  const int64_t first = rule.from(rule.i0), last = rule.to(rule.i1 - 1);
  for (int64_t i = 0; i < s.stretches; ++i) {
    const Stretch& x = s.stretch[i];
    int64_t step;
    const A* keys = Keys<T>::rows(values ? s.a.v : s.a.k, values ? s.v : s.k, width, s, x, step);
    const int64_t from = first > x.first ? first - x.first : 0, to = least(last - x.first, x.count);
    const int64_t rows = Ahead::done(s.ahead) ? x.count : TAB_TILE_ROWS;  // between two askings
    for (int64_t r = from; r < to; r += rows) {
      Ahead::ask(s.ahead, LINES);
      gemm(least(rows, to - r), Q<A>, width, keys + r * step, step, xt, ld, y + (x.at + r) * ld, ld,
           false);
    }
  }
}

/// y (count, width) += pᵀ · rows of K (or V), p (keys, Q) with rows ld apart. A tile of queries skips
/// the keys at both ends that it cannot see.
template <class T, class Rule>
static void times_keys(const Keys<T>& s, const Rule& rule, bool values, const acc_t<T>* p,
                       int64_t ld, acc_t<T>* y) {
  using A = acc_t<T>;
  const int64_t width = padded<A>(values ? s.a.e : s.a.d);
  const int64_t i0 = rule.i0, count = rule.i1 - i0;
  for (int64_t i = 0; i < s.stretches; ++i) {
    const Stretch& x = s.stretch[i];
    int64_t step;
    const A* keys = Keys<T>::rows(values ? s.a.v : s.a.k, values ? s.v : s.k,
                                  values ? s.a.e : s.a.d, s, x, step);
    for (int64_t r = 0; r < count; r += TAB_TILE_ROWS) {
      const int64_t rows = r + TAB_TILE_ROWS < count ? TAB_TILE_ROWS : count - r;
      int64_t from = rule.from(i0 + r) - x.first, to = rule.to(i0 + r + rows - 1) - x.first;
      from = from > 0 ? from : 0, to = to < x.count ? to : x.count;
      Ahead::ask(s.ahead, LINES);
      if (from < to)
        gemm<true>(rows, width, to - from, p + (x.at + from) * ld + r, ld, keys + from * step, step,
                   y + r * width, width, true);
    }
  }
}

/// The same over the pairs that see each other, or `to_keys`: row j - first of y (rows of ldy) +=
/// Σ_i p_ij x_i.
template <bool to_keys, class T, class Rule>
static __attribute__((noinline)) void pair_by_pair(const Keys<T>& s, const Rule& rule,
                                                   const Run* run, const Run* end, bool values,
                                                   const acc_t<T>* p, int64_t ld, const acc_t<T>* x,
                                                   acc_t<T>* y, int64_t ldy, int64_t first) {
  using A = acc_t<T>;
  const int64_t width = padded<A>(values ? s.a.e : s.a.d);
  const Stretch* t = s.stretch;
  int64_t at = 0, step;
  for (; run < end; ++run)
    for (int64_t j = run->first; j < run->first + run->count; ++j, ++at, p += ld) {
      t += at == t->at + t->count;
      if (masked(s.a, s.b, j)) continue;
      const A* keys = Keys<T>::rows(values ? s.a.v : s.a.k, values ? s.v : s.k,
                                    values ? s.a.e : s.a.d, s, *t, step);
      for (int64_t i = 0; i < rule.i1 - rule.i0; ++i) {
        if (!rule.whole(*run, j) && !Rule::seen(rule, *run, j, i / W<A>)[i % W<A>]) continue;
        if (to_keys)
          add_scaled(y + (j - first) * ldy, p[i], x + i * width, width);
        else
          add_scaled(y + i * width, p[i], keys + (at - t->at) * step, width);
      }
    }
}

// --- forward --------------------------------------------------------------------------------------

/// Masks s (keys, Q) of the runs and raises `top`, its maximum per lane.
template <class A, class Rule>
static void mask_scores(const Rule& rule, const Run* run, const Run* end, A* s, A* top) {
  const Vec<A> nothing = splat<A>(-__builtin_inf());
  Vec<A> top0 = load(top), top1 = load(top + W<A>);
  for (; run < end; ++run)
    for (int64_t j = run->first; j < run->first + run->count; ++j, s += Q<A>) {
      Vec<A> s0 = load(s), s1 = load(s + W<A>);
      if (!rule.whole(*run, j)) {
        s0 = Rule::seen(rule, *run, j, 0) ? s0 : nothing;
        s1 = Rule::seen(rule, *run, j, 1) ? s1 : nothing;
        store(s, s0);
        store(s + W<A>, s1);
      }
      top0 = maximum<A>(top0, s0);
      top1 = maximum<A>(top1, s1);
    }
  store(top, top0);
  store(top + W<A>, top1);
}

/// s = 2^(s - top) in place, `total` (Q) += its sum over the keys.
template <class A>
static void exponentiate(int64_t keys, const A* top, A* s, A* total) {
  const Vec<A> top0 = finite<A>(load(top)), top1 = finite<A>(load(top + W<A>));
  Vec<A> sum0 = load(total), sum1 = load(total + W<A>);
  for (A* end = s + keys * Q<A>; s < end; s += Q<A>) {
    const Vec<A> p0 = exp2<A>(load(s) - top0), p1 = exp2<A>(load(s + W<A>) - top1);
    store(s, p0);
    store(s + W<A>, p1);
    sum0 += p0;
    sum1 += p1;
  }
  store(total, sum0);
  store(total + W<A>, sum1);
}

/// What was summed under `old` maxima becomes a sum under `top`.
template <class A>
static void rescale(int64_t count, int64_t width, const A* old, const A* top, A* total, A* o) {
  A factor[Q<A>];
  for (int64_t i = 0; i < Q<A>; i += W<A>) {
    const Vec<A> f = exp2<A>(load(old + i) - finite<A>(load(top + i)));
    store(factor + i, f);
    store(total + i, load(total + i) * f);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j < width; j += W<A>)
      store(o + i * width + j, load(o + i * width + j) * factor[i]);
}

/// o and lse of the queries i0 … of one head, which may see the keys of `runs`.
template <class T, class Rule>
static void strip_forward(const Softmax& a, const Rule& rule, int64_t head, int64_t i0,
                          const Run* first, const Run* end, Stretch* stretch, Ahead& ahead,
                          Arena<acc_t<T>> arena) {
  using A = acc_t<T>;
  const int64_t b = head / a.h, h = head % a.h, dp = padded<A>(a.d), ep = padded<A>(a.e);
  const int64_t count = i0 + Q<A> < a.n ? Q<A> : a.n - i0;
  A *qt = arena.take(a.d * Q<A>), *q = arena.take(Q<A> * dp), *o = arena.take(Q<A> * ep);
  A *s = arena.take(a.chunk * Q<A>), *k = nullptr, *v = nullptr;
  if (a.copy) k = arena.take(a.chunk * dp), v = arena.take(a.chunk * ep);
  Keys<T> keys{a, b, h / a.group, k, v, stretch, ahead};
  A top[Q<A>], old[Q<A>], total[Q<A>];

  load_rows<T>(row<T>(a.q, b, h, i0), a.q.n, count, a.d, q);
  for (int64_t i = 0; i < count; ++i)
    prefetch_row(row<T>(a.o, b, h, i0 + i), a.e);  // to be written
  if (a.mask != nullptr) quiet_queries(a, b, i0, count, dp, q);
  turn(count, a.d, q, product_scale<A>(a), qt, Q<A>);
  for (bool paired = false;; paired = true) {
    clear(o, count * ep);
    clear(total, Q<A>);
    for (int64_t i = 0; i < Q<A>; ++i) top[i] = -__builtin_inf();
    for (const Run *begin = first, *run; begin < end; begin = run) {
      run = Keys<T>::next(keys, begin, end);
      keys_times<T>(keys, rule, false, qt, s, Q<A>);
      if (adjusts(a))
        adjust<A>(a, b, h, i0, stretch, stretch + keys.stretches, Q<A>, s, nullptr, nullptr);
      __builtin_memcpy(old, top, sizeof top);
      mask_scores(rule, begin, run, s, top);
      if (begin != first) rescale(count, ep, old, top, total, o);
      exponentiate(keys.size, top, s, total);
      if (paired)
        pair_by_pair<false>(keys, rule, begin, run, true, s, Q<A>, s, o, ep, 0);
      else
        times_keys<T>(keys, rule, true, s, Q<A>, o);
    }
    if (paired || all_finite(o, count * ep)) break;
  }
  A* lse = static_cast<A*>(a.lse) + head * a.row + i0;
  for (int64_t i = 0; i < count; ++i) {
    store_row(row<T>(a.o, b, h, i0 + i), a.e, o + i * ep, total[i] == 0 ? A(0) : 1 / total[i]);
    lse[i] = (top[i] + log2(total[i])) * LN2<A>;
  }
}

}  // namespace tab::TAB_ISA
