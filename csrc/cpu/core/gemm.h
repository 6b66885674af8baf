// Small matrix products on scratch that lies in L1 or L2. Included by each_isa.h, once per
// instruction set, so it has no include guard.
//
//     C (M, N) = A·B or C += A·B      A (M, K) row-major, or Aᵀ given as (K, M); B (K, N) row-major
//
// C += A·B adds the whole product, not one term after the other: a sum over tiles of tokens is then
// as exact as one of its tiles. `low` (M, N; strides of C) makes that addition compensated (add_to).
//
// A register tile of TAB_TILE_ROWS × 2 vectors (6×16 floats on AVX2, 8×32 on AVX-512) stays in
// registers over all of K. N counts whole vectors: rows of B and C are padded (padded<A>(n)) and
// the padding of B holds zeros. A needs no padding. Nothing is packed here: the caller stages B in
// a compact scratch matrix, as load_row does on the way in, transposed where that is needed.

namespace tab::TAB_ISA {

/// x + n, or null.
template <class A>
TAB_INLINE A* beside(A* x, int64_t n) {
  return x == nullptr ? x : x + n;
}

template <bool transposed, int rows, int columns, class A>
TAB_INLINE void gemm_tile(int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c,
                          int64_t ldc, bool accumulate, A* low) {
  Vec<A> sum[rows][columns];
#pragma GCC unroll 8
  for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < columns; ++j) sum[i][j] = Vec<A>{};
  for (int64_t p = 0; p < k; ++p) {
    Vec<A> row[columns];
#pragma GCC unroll 2
    for (int j = 0; j < columns; ++j) row[j] = load(b + p * ldb + j * W<A>);
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i) {
      const A x = transposed ? a[p * lda + i] : a[i * lda + p];
#pragma GCC unroll 2
      for (int j = 0; j < columns; ++j) sum[i][j] += row[j] * x;
    }
  }
  if (!accumulate)
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < columns; ++j) store(c + i * ldc + j * W<A>, sum[i][j]);
  else if (low == nullptr)
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < columns; ++j) add_to<A>(c + i * ldc + j * W<A>, sum[i][j], nullptr);
  else
#pragma GCC unroll 8
    for (int i = 0; i < rows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < columns; ++j)
        add_to<A>(c + i * ldc + j * W<A>, sum[i][j], low + i * ldc + j * W<A>);
}

template <bool transposed, int columns, class A>
static void gemm_panel(int64_t m, int64_t k, const A* a, int64_t lda, const A* b, int64_t ldb, A* c,
                       int64_t ldc, bool accumulate, A* low = nullptr) {
  constexpr int rows = TAB_TILE_ROWS;
  const int64_t step = transposed ? 1 : lda;  // from one row of A to the next
  int64_t i = 0;
  for (; i + rows <= m; i += rows)
    gemm_tile<transposed, rows, columns>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate,
                                         beside(low, i * ldc));
  if (rows > 4 && i + 4 <= m) {
    gemm_tile<transposed, 4, columns>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate,
                                      beside(low, i * ldc));
    i += 4;
  }
  if (i + 2 <= m) {
    gemm_tile<transposed, 2, columns>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate,
                                      beside(low, i * ldc));
    i += 2;
  }
  if (i < m)
    gemm_tile<transposed, 1, columns>(k, a + i * step, lda, b, ldb, c + i * ldc, ldc, accumulate,
                                      beside(low, i * ldc));
}

/// C (m, n) = A·B, or C += A·B; with `transposed` A is read from (k, m) storage. n % W<A> == 0.
template <bool transposed = false, class A>
TAB_INLINE void gemm(int64_t m, int64_t n, int64_t k, const A* a, int64_t lda, const A* b,
                     int64_t ldb, A* c, int64_t ldc, bool accumulate, A* low = nullptr) {
  int64_t j = 0;
  for (; j + 2 * W<A> <= n; j += 2 * W<A>)
    gemm_panel<transposed, 2>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate, beside(low, j));
  if (j < n)
    gemm_panel<transposed, 1>(m, k, a, lda, b + j, ldb, c + j, ldc, accumulate, beside(low, j));
}

/// y += P·x, or Pᵀ·x, for the lower triangle P (count, count), term by term: x may hold NaN or ∞,
/// which must not meet the zeros above the diagonal.
template <bool transposed, class A>
static __attribute__((noinline)) void lower_times(int64_t count, int64_t width, const A* p,
                                                  int64_t ldp, const A* x, A* y) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j)
      add_scaled(y + (transposed ? j : i) * width, p[i * ldp + j], x + (transposed ? i : j) * width,
                 width);
}

/// y (columns, padded rows) = xᵀ of x (rows, columns), the padding zeroed.
template <class A>
static TAB_OUTLINE void transpose(int64_t rows, int64_t columns, const A* x, int64_t ldx, A* y,
                                  int64_t ldy) {
  typedef A Quad __attribute__((vector_size(4 * sizeof(A))));
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      Quad r0, r1, r2, r3;
      __builtin_memcpy(&r0, x + i * ldx + j, sizeof r0);
      __builtin_memcpy(&r1, x + (i + 1) * ldx + j, sizeof r1);
      __builtin_memcpy(&r2, x + (i + 2) * ldx + j, sizeof r2);
      __builtin_memcpy(&r3, x + (i + 3) * ldx + j, sizeof r3);
      const Quad a = TAB_SHUFFLE(r0, r1, 0, 4, 1, 5);
      const Quad b = TAB_SHUFFLE(r2, r3, 0, 4, 1, 5);
      const Quad c = TAB_SHUFFLE(r0, r1, 2, 6, 3, 7);
      const Quad d = TAB_SHUFFLE(r2, r3, 2, 6, 3, 7);
      r0 = TAB_SHUFFLE(a, b, 0, 1, 4, 5);
      r1 = TAB_SHUFFLE(a, b, 2, 3, 6, 7);
      r2 = TAB_SHUFFLE(c, d, 0, 1, 4, 5);
      r3 = TAB_SHUFFLE(c, d, 2, 3, 6, 7);
      __builtin_memcpy(y + j * ldy + i, &r0, sizeof r0);
      __builtin_memcpy(y + (j + 1) * ldy + i, &r1, sizeof r1);
      __builtin_memcpy(y + (j + 2) * ldy + i, &r2, sizeof r2);
      __builtin_memcpy(y + (j + 3) * ldy + i, &r3, sizeof r3);
    }
    for (; j < columns; ++j)
      for (int64_t p = 0; p < 4; ++p) y[j * ldy + i + p] = x[(i + p) * ldx + j];
  }
  for (int64_t j = 0; j < columns; ++j)
    for (int64_t p = i; p < padded<A>(rows); ++p) y[j * ldy + p] = p < rows ? x[p * ldx + j] : A(0);
}

}  // namespace tab::TAB_ISA
