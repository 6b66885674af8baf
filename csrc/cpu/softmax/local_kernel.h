// Local attention, the arithmetic (formulas: local.cpp, softmax_kernel.h, softmax_backward.h).
// Included once per instruction set.

#include "softmax_kernel.h"
#include "softmax_backward.h"

namespace tab::TAB_ISA {

/// Who sees whom: -left ≤ row(j) - row(i) ≤ right, on a grid the same for the columns, causal j ≤ i.
/// On a line every token is its own row, and query i stands at i + shift.
template <class A, bool grid>
struct Window {
  const Local& a;
  int64_t i0, i1, cols;
  Int<A> lane[2], down[2], across[2];  // place, row(i), column(i) of each query

  /// Of the panel that begins with query i0.
  TAB_INLINE Window at(const Local& a, int64_t i0, int64_t /* strip */) {
    const int64_t i1 = i0 + Q<A> < a.n ? i0 + Q<A> : a.n;
    Window x{a, i0, i1, grid ? a.cols : 1, {}, {}, {}};
    for (int64_t i = 0; i < Q<A>; ++i) {
      const int64_t half = i / W<A>, l = i % W<A>;
      x.lane[half][l] = i0 + i + a.shift;
      if (grid) x.down[half][l] = (i0 + i) / x.cols, x.across[half][l] = (i0 + i) % x.cols;
    }
    return x;
  }
  /// The keys of whole rows around query i.
  int64_t from(int64_t i) const {
    const int64_t j = grid ? (i / cols - a.left) * cols : i + a.shift - a.left;
    return j > 0 ? j : 0;
  }
  int64_t to(int64_t i) const {
    const int64_t j = a.causal ? i + a.shift + 1
                      : grid   ? (i / cols + a.right + 1) * cols
                               : i + a.shift + a.right + 1;
    return j < 0 ? 0 : j < a.m ? j : a.m;
  }
  int64_t seen_from(int64_t j) const {
    const int64_t i = a.causal ? j - a.shift
                      : grid   ? (j / cols - a.right) * cols
                               : j - a.shift - a.right;
    return i > 0 ? i : 0;
  }
  int64_t seen_to(int64_t j) const {
    const int64_t i = grid ? (j / cols + a.left + 1) * cols : j - a.shift + a.left + 1;
    return i < a.n ? i : a.n;
  }
  bool reaches(const Run&, int64_t j) const { return from(i0) <= j && j < to(i1 - 1); }
  bool whole(const Run&, int64_t j) const {
    const int64_t p0 = i0 + a.shift, p1 = i1 - 1 + a.shift;
    return !grid && p1 - a.left <= j && j <= p0 + a.right && (!a.causal || j <= p0);
  }
  TAB_INLINE Int<A> seen(const Window& x, const Run&, int64_t j, int half) {
    typedef typename integer<A>::scalar I;
    Int<A> yes;
    if constexpr (grid) {
      const I row = j / x.cols, column = j % x.cols, left = x.a.left, right = x.a.right;
      yes = (x.down[half] >= row - right) & (x.down[half] <= row + left) &
            (x.across[half] >= column - right) & (x.across[half] <= column + left);
    } else {
      yes = (x.lane[half] >= I(j - x.a.right)) & (x.lane[half] <= I(j + x.a.left));
    }
    return x.a.causal ? yes & (x.lane[half] >= I(j)) : yes;
  }
};

/// The one run of keys around the queries i0 … i1, in pieces that fit a chunk.
template <class Rule>
TAB_INLINE int64_t list_keys(const Rule& rule, int64_t i0, int64_t i1, Run* runs) {
  const int64_t to = rule.to(i1 - 1);
  int64_t count = 0;
  for (int64_t j = rule.from(i0); j < to; j += rule.a.chunk)
    runs[count++] = {j, j + rule.a.chunk < to ? rule.a.chunk : to - j, 1};
  return count;
}

template <bool grid, class T>
static void strips(const Local& where, const Part& part, const Sums* sums, Run* runs,
                   Stretch* stretch, void* scratch) {
  using A = acc_t<T>;
  const int64_t queries = sums == nullptr ? Q<A> : BACKWARD<A>;
  const int64_t begin = part.first % where.strips * queries,
                last = (part.last - 1) % where.strips * queries;
  const bool heads = part.first / where.strips != (part.last - 1) / where.strips;  // several of q
  const auto ends = Window<A, grid>::at(where, begin, begin);
  Arena<A> arena{static_cast<A*>(scratch)};
  const Local a =
      bring_together<T>(where, part, queries, heads ? 0 : ends.from(begin),
                        heads ? where.m : ends.to(least(last + queries, where.n) - 1), arena);
  Ahead ahead = next_head<T>(where, part, sums != nullptr);
  Run* listed = a.mask != nullptr ? runs + a.runs : runs;
  for (int64_t t = part.first; t < part.last; t += part.step) {
    const int64_t head = part.head * a.group + t / a.strips, i0 = t % a.strips * queries;
    const auto rule = Window<A, grid>::at(a, i0, i0);
    int64_t count = list_keys(rule, i0, least(i0 + queries, a.n), listed);
    if (a.mask != nullptr) count = leave_out_masked(a, head / a.h, listed, listed + count, runs);
    if (sums == nullptr)
      strip_forward<T>(a, rule, head, i0, runs, runs + count, stretch, ahead, arena);
    else
      strip_backward<T, Window<A, grid>>(a, head, i0, runs, runs + count, stretch, *sums, ahead,
                                         arena);
  }
}

template <class T>
static void window(const Local& a, const Part& part, const Sums* sums, Run* runs, Stretch* stretch,
                   void* scratch) {
  if (a.cols > 0)
    strips<true, T>(a, part, sums, runs, stretch, scratch);
  else
    strips<false, T>(a, part, sums, runs, stretch, scratch);
}

template <class T>
constexpr SoftmaxKernels<Local> local_kernels = {W<acc_t<T>>, Q<acc_t<T>>, BACKWARD<acc_t<T>>,
                                                 window<T>, finish<T, Local>};

}  // namespace tab::TAB_ISA
