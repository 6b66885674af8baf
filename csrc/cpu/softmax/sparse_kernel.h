// Block-sparse attention, the arithmetic (formulas: sparse.cpp, softmax_kernel.h, softmax_backward.h).
// Included once per instruction set.

#include "softmax_kernel.h"
#include "softmax_backward.h"

namespace tab::TAB_ISA {

/// The lanes see a run by the bit of their block row; causal: and only keys j ≤ i + shift.
template <class A>
struct Blocks {
  const Sparse& a;
  int64_t i0, i1, rows;  // rows: of the bits of a strip's block rows, those of this panel
  Int<A> lane[2], bit[2];

  /// Of the panel that begins with query i0, in a strip that begins with query `strip`.
  TAB_INLINE Blocks at(const Sparse& a, int64_t i0, int64_t strip) {
    const int64_t i1 = least(i0 + Q<A>, a.n), first = strip / a.block;
    const int64_t below = (int64_t(1) << (i0 / a.block - first)) - 1;
    Blocks x{a, i0, i1, ((int64_t(2) << ((i1 - 1) / a.block - first)) - 1) & ~below, {}, {}};
    for (int64_t i = 0; i < Q<A>; ++i) {
      x.lane[i / W<A>][i % W<A>] = i0 + i + a.shift;
      x.bit[i / W<A>][i % W<A>] = (i0 + i) / a.block - first;
    }
    return x;
  }
  int64_t from(int64_t) const { return 0; }
  int64_t to(int64_t i) const { return a.causal ? i + a.shift + 1 : a.m; }
  int64_t seen_from(int64_t j) const { return a.causal ? j - a.shift : 0; }
  int64_t seen_to(int64_t) const { return a.n; }
  bool reaches(const Run& run, int64_t j) const { return (run.rows & rows) && j < to(i1 - 1); }
  bool whole(const Run& run, int64_t j) const {
    return (run.rows & rows) == rows && (!a.causal || j <= i0 + a.shift);
  }
  TAB_INLINE Int<A> seen(const Blocks& x, const Run& run, int64_t j, int half) {
    typedef typename integer<A>::scalar I;
    const Int<A> listed = (Int<A>{} + I(run.rows)) >> x.bit[half] & 1;
    const Int<A> yes = listed != 0;
    return x.a.causal ? yes & (x.lane[half] >= I(j)) : yes;
  }
};

/// The keys that the block rows of the queries i0 … i1 list, in order; neighbours of one kind are one
/// run.
/// Which rows list block c is noted in scratch[c].count meanwhile.
TAB_INLINE int64_t list_keys(const Sparse& a, int64_t head, int64_t i0, int64_t i1,
                             Stretch* scratch, Run* runs) {
  const int32_t* row_ptr = a.row_ptr + (a.patterns == 1 ? 0 : head % a.h) * (a.blocks + 1);
  const int64_t first = i0 / a.block, last = (i1 - 1) / a.block;
  for (int64_t c = 0; c < a.columns; ++c) scratch[c].count = 0;
  for (int64_t r = first; r <= last; ++r)
    for (int32_t p = row_ptr[r]; p < row_ptr[r + 1]; ++p)
      scratch[a.col[p]].count |= int64_t(1) << (r - first);
  const int64_t end = a.causal ? i1 + a.shift : a.m;
  int64_t count = 0;
  Run* run = nullptr;
  for (int64_t c = 0; c < a.columns; ++c) {
    const int64_t rows = scratch[c].count;
    for (int64_t j = c * a.block, stop = j + a.block < end ? j + a.block : end; rows && j < stop;) {
      const bool joins =
          run && run->rows == rows && run->first + run->count == j && run->count < a.chunk;
      if (!joins) {
        run = runs + count++;
        *run = {j, 0, rows};
      }
      const int64_t room = a.chunk - run->count, more = room < stop - j ? room : stop - j;
      run->count += more, j += more;
    }
  }
  return count;
}

template <class T>
static void strips(const Sparse& where, const Part& part, const Sums* sums, Run* runs,
                   Stretch* stretch, void* scratch) {
  using A = acc_t<T>;
  const int64_t queries = sums == nullptr ? Q<A> : BACKWARD<A>;
  Arena<A> arena{static_cast<A*>(scratch)};
  const Sparse a = bring_together<T>(where, part, queries, 0, where.m, arena);
  Ahead ahead = next_head<T>(where, part, sums != nullptr);
  Run* listed = a.mask != nullptr ? runs + a.runs : runs;
  for (int64_t t = part.first; t < part.last; t += part.step) {
    const int64_t head = part.head * a.group + t / a.strips, i0 = t % a.strips * queries;
    int64_t count = list_keys(a, head, i0, least(i0 + queries, a.n), stretch, listed);
    if (a.mask != nullptr) count = leave_out_masked(a, head / a.h, listed, listed + count, runs);
    if (sums == nullptr)
      strip_forward<T>(a, Blocks<A>::at(a, i0, i0), head, i0, runs, runs + count, stretch, ahead,
                       arena);
    else
      strip_backward<T, Blocks<A>>(a, head, i0, runs, runs + count, stretch, *sums, ahead, arena);
  }
}

template <class T>
constexpr SoftmaxKernels<Sparse> sparse_kernels = {W<acc_t<T>>, Q<acc_t<T>>, BACKWARD<acc_t<T>>,
                                                   strips<T>, finish<T, Sparse>};

}  // namespace tab::TAB_ISA
