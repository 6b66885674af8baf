// Linear attention, bidirectional, where D = Dv is four vectors: 64 on AVX-512 (formulas:
// linear.cpp). Included by linear_kernel.h for that instruction set.
//
// A register tile is four tokens × the whole row, so that what follows a product (the denominator,
// φ', the sums over a row) happens in registers and each result goes from there to its tensor. The
// loops of linear_kernel.h and linear_backward.h pass through scratch instead: 1,150 cycles a token,
// forward and backward, where these take 930 and the products alone, at the peak of the FMA units,
// 768 (one core, all in its caches).

namespace tab::TAB_ISA {

template <class T>
using Wide = Segment<T, 4 * W<acc_t<T>>>;
template <class A>
using Tile = Vec<A>[4][4];  // four rows of four vectors

/// x (4 rows) += A·B for A (4, D) with rows lda apart and B (D, D).
template <class A>
TAB_INLINE void add_product(const A* a, int64_t lda, const A* b, Tile<A>& x) {
  constexpr int64_t d = 4 * W<A>;
  for (int64_t p = 0; p < d; ++p) {
    Vec<A> row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) row[j] = load(b + p * d + j * W<A>);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) x[i][j] += row[j] * a[i * lda + p];
  }
}

/// The numbers of rows t, t+1, …, and the step between two: where they lie, or a copy in `scratch`
/// if they must be converted or masked, or if a group of four would reach behind the tensor.
template <class T>
TAB_INLINE const acc_t<T>* numbers(const Rows& x, const Wide<T>& s, int64_t t, int64_t count,
                                   acc_t<T>* scratch, int64_t* step) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    *step = x.n;
    if (count % 4 == 0 && s.a.mask == nullptr) return Wide<T>::row(x, s, t);
  }
  *step = 4 * W<acc_t<T>>;
  Wide<T>::values(x, s, s.a.mask, t, count, scratch);
  return scratch;
}

/// Asks for rows t … t + 3 into L2. Called between products for the rows of the next tile: the
/// products wait for no memory, and the memory would else be idle while they run.
template <class T>
TAB_INLINE void ask(const Rows& x, const Wide<T>& s, int64_t t) {
  for (int64_t i = 0; i < 4; ++i) {
    const T* p = Wide<T>::row(x, s, t + i);
    for (int64_t j = 0; j < 4 * W<acc_t<T>>; j += 64 / sizeof(T)) __builtin_prefetch(p + j, 0, 2);
  }
}

/// y (count) = 1/(f·z + ε) over the rows of f, 0 where that is 1/0; count is rounded up to fours.
template <class A>
TAB_INLINE void inverses(int64_t count, const A* f, const A* z, A eps, A* y) {
  for (int64_t t = 0; t < count; t += 4, f += 16 * W<A>) {
    Vec<A> part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      part[i] = load(f + 4 * i * W<A>) * load(z);
#pragma GCC unroll 4
      for (int j = 1; j < 4; ++j) part[i] += load(f + (4 * i + j) * W<A>) * load(z + j * W<A>);
    }
    const Vec<A> den = four_sums<A>(part) + eps;
    store_four(y + t, den == 0 ? Vec<A>{} : 1 / den);
  }
}

template <class T>
static void wide_keys(const Linear& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  constexpr int64_t d = 4 * W<A>;
  const auto s = Wide<T>::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *fk = arena.take(a.tile * d), *copy = arena.take(a.tile * d), *sum = static_cast<A*>(state);
  A *low = lost(a, arena, d * d), *low_z = lost(a, arena, d);
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
    int64_t step;
    Wide<T>::features(a.k, s, a.mask, t, count, fk, &a.v);
    const A* v = numbers<T>(a.v, s, t, count, copy, &step);
    for (int64_t i = 0; i < d; i += 8) {
      for (int r = 0; r < 8; r += 4)
        ask<T>(a.k, s, t + a.tile + i + r), ask<T>(a.v, s, t + a.tile + i + r);
      gemm<true>(8, d, count, fk + i, d, v, step, sum + i * d, d, true, beside(low, i * d));
    }
    add_rows<A>(sum + d * d, nullptr, fk, count, d, low_z);
  }
}

template <class T>
static void wide_outputs(const Linear& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  constexpr int64_t d = 4 * W<A>;
  const auto keys = Wide<T>::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *fq = arena.take(a.tile * d), *inverse = arena.take(a.tile);
  const A *sum = static_cast<A*>(state), *z = sum + d * d;
  for (int64_t head = 0; head < a.group; ++head) {
    const auto s = Wide<T>::of_queries(keys, head);
    for (int64_t t = s.from; t < s.to; t += a.tile) {
      const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
      Wide<T>::features(a.q, s, nullptr, t, count, fq);
      inverses<A>(count, fq, z, a.eps, inverse);
      for (int64_t i = 0; i < count; i += 4) {
        Tile<A> o{};
        ask<T>(a.q, s, t + a.tile + i);
        add_product(fq + i * d, d, sum, o);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r)
          if (i + r < count)
            put_row(Wide<T>::row(a.o, s, t + i + r), o[r], splat<A>(inverse[i + r]), a.stream);
      }
    }
  }
  fence();
}

template <class T>
static void wide_queries(const Linear& a, int64_t task, void* state, void* dstate, void* scratch) {
  using A = acc_t<T>;
  constexpr int64_t d = 4 * W<A>;
  const auto keys = Wide<T>::at(a, task);
  const auto slope = Slope<A>::of(a.map);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *fq = arena.take(a.tile * d), *g = arena.take(a.tile * d), *st = arena.take(d * d);
  A *inverse = arena.take(a.tile), *r = arena.take(a.tile);
  A *z = static_cast<A*>(state) + d * d, *dsum = static_cast<A*>(dstate);
  A *low = lost(a, arena, d * d), *low_z = lost(a, arena, d);
  transpose(d, d, static_cast<A*>(state), d, st, d);
  for (int64_t head = 0; head < a.group; ++head) {
    const auto s = Wide<T>::of_queries(keys, head);
    for (int64_t t = s.from; t < s.to; t += a.tile) {
      const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
      Wide<T>::features(a.q, s, nullptr, t, count, fq, &a.grad);
      drop_queries(s, t, count, fq);
      inverses<A>(count, fq, z, a.eps, inverse);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t j = 0; j < d; j += W<A>)
          store(g + i * d + j, load(Wide<T>::row(a.grad, s, t + i) + j) * inverse[i]);
      for (int64_t i = 0; i < count; i += 4) {
        Tile<A> df{};
        ask<T>(a.q, s, t + a.tile + i), ask<T>(a.grad, s, t + a.tile + i);
        add_product(g + i * d, d, st, df);
        const A* f = fq + i * d;
        Vec<A> part[4];  // g·o = φ(q)·(S g)/den
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          part[n] = df[n][0] * load(f + n * d);
#pragma GCC unroll 4
          for (int j = 1; j < 4; ++j) part[n] += df[n][j] * load(f + n * d + j * W<A>);
        }
        store_four(r + i, four_sums<A>(part) * -load_four(inverse + i));
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j)
            df[n][j] = (df[n][j] + load(z + j * W<A>) * r[i + n]) *
                       Slope<A>::at(slope, load(f + n * d + j * W<A>));
          if (i + n < count)
            put_row(Wide<T>::row(a.dq, s, t + i + n), df[n], splat<A>(1), a.stream);
        }
      }
      gemm<true>(d, d, count, fq, d, g, d, dsum, d, true, low);
      add_rows<A>(dsum + d * d, r, fq, count, d, low_z);
    }
  }
  fence();
}

template <class T>
static void wide_gradients(const Linear& a, int64_t task, void* dstate, void* scratch) {
  using A = acc_t<T>;
  constexpr int64_t d = 4 * W<A>;
  const auto s = Wide<T>::at(a, task);
  const auto slope = Slope<A>::of(a.map);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *fk = arena.take(a.tile * d), *copy = arena.take(a.tile * d), *dst = arena.take(d * d);
  const A *dsum = static_cast<A*>(dstate), *dz = dsum + d * d;
  transpose(d, d, dsum, d, dst, d);
  for (int64_t t = s.from; t < s.to; t += a.tile) {
    const int64_t count = t + a.tile < s.to ? a.tile : s.to - t;
    int64_t step;
    Wide<T>::features(a.k, s, a.mask, t, count, fk, &a.v);
    const A* v = numbers<T>(a.v, s, t, count, copy, &step);
    for (int64_t i = 0; i < count; i += 4) {
      Tile<A> dv{};
      ask<T>(a.k, s, t + a.tile + i);
      add_product(fk + i * d, d, dsum, dv);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
        if (i + r < count) put_row(Wide<T>::row(a.dv, s, t + i + r), dv[r], splat<A>(1), a.stream);
    }
    for (int64_t i = 0; i < count; i += 4) {
      Tile<A> df;
      ask<T>(a.v, s, t + a.tile + i);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) df[r][j] = load(dz + j * W<A>);
      add_product(v + i * step, step, dst, df);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        if (i + r >= count) continue;
        const bool seen = a.mask == nullptr || a.mask[s.b * a.n + t + i + r];
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j)
          df[r][j] =
              seen ? df[r][j] * Slope<A>::at(slope, load(fk + (i + r) * d + j * W<A>)) : Vec<A>{};
        put_row(Wide<T>::row(a.dk, s, t + i + r), df[r], splat<A>(1), a.stream);
      }
    }
  }
  fence();
}

template <class T>
constexpr LinearKernels linear_kernels_wide = {W<acc_t<T>>, wide_keys<T>, wide_outputs<T>,
                                               wide_queries<T>, wide_gradients<T>};

}  // namespace tab::TAB_ISA
