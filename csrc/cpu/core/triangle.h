// What kernels of causal sums share: products with the pairs of one tile of tokens, P (count, Tp),
// lower triangular, and long sums. Included by them, once per instruction set, after segments.h.

namespace tab::TAB_ISA {

/// p (count, Tp) = tril(x·yᵀ + r), r one number a row, given yᵀ (width, Tp).
template <class A>
static void triangle(int64_t count, int64_t width, const A* x, int64_t ldx, const A* yt, const A* r,
                     A* p) {
  const int64_t tp = padded<A>(count);
  for (int64_t i = 0; i < count; i += 16) {  // columns right of the diagonal block are not computed
    const int64_t rows = i + 16 < count ? 16 : count - i, columns = padded<A>(i + rows);
    gemm(rows, columns, width, x + i * ldx, ldx, yt, tp, p + i * tp, tp, false);
    for (int64_t t = i; t < i + rows; ++t) {
      if (r != nullptr)
        for (int64_t j = 0; j <= t; ++j) p[t * tp + j] += r[t];
      clear(p + t * tp + t + 1, tp - t - 1);
    }
  }
}

/// y += P·x (or Pᵀ·x) for lower triangular P (count, Tp), x and y (count, width).
template <bool transposed, class A>
static void triangle_times(int64_t count, int64_t width, const A* p, const A* x, A* y) {
  const int64_t tp = padded<A>(count);
  if (!all_finite(x, count * width)) return lower_times<transposed>(count, width, p, tp, x, y);
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t rows = i + 16 < count ? 16 : count - i;
    if (transposed)
      gemm<true>(rows, width, count - i, p + i * tp + i, tp, x + i * width, width, y + i * width,
                 width, true);
    else
      gemm(rows, width, i + rows, p + i * tp, tp, x, width, y + i * width, width, true);
  }
}

/// Zeros for what the sums of a segment round away, or null where they are short.
template <class A>
TAB_INLINE A* lost(const Segmented& a, Arena<A>& arena, int64_t n) {
  if (!a.compensated) return nullptr;
  A* low = arena.take(n);
  clear(low, n);
  return low;
}

}  // namespace tab::TAB_ISA
