// Softmax attention of one (batch, head) with N ≤ 64 tokens, all on chip: local and sparse.
//
//   S = scale·QKᵀ (−∞ where not seen),  L = log Σ_j exp S_j,  O = exp(S − L) V   (tab/ops/_softmax.py)
//
// A block computes one (batch, head). Which keys a query sees is 64 bits, so every pattern is the
// same kernel. S and P stay in registers; Q, K and V pass through tiles of 64 columns, so any D fits.
//
// Floor at B 512 H 8 N 64 D 64 (4.3 TB/s; 60 TFLOP/s FMA), predicted: float32 62 µs for 4 tensors, 72
// for 4.3 GFLOP. Half types: half the bytes, and tensor cores do the FLOPs in a tenth of that, so
// memory counts.
#pragma once

#include "../core/tile.cuh"

namespace tab::few {

/// Bits lo to hi, both inclusive, of 64.
TAB_DEVICE uint64_t span(int lo, int hi) {
  return hi < lo ? 0 : (~uint64_t{0} >> (63 - hi)) & (~uint64_t{0} << lo);
}

/// Which keys a query sees.
struct Sees {
  int n;
  bool causal;
  int left, right, rows, cols;  // local; cols 0: the tokens are a line
  const int *row_ptr, *col;     // sparse, or null: (Hp, nb + 1) and entries, of blocks of `block`
  int block, patterns;          // Hp is 1 or H
  const uint8_t* mask;          // (B, N) or null

  TAB_DEVICE Tokens real(int b) const { return Tokens::of(n, mask, b); }

  TAB_DEVICE uint64_t operator()(int b, int h, int i) const {
    uint64_t bits = 0;
    if (row_ptr != nullptr) {
      const int blocks = (n + block - 1) / block;
      const int* row = row_ptr + (patterns == 1 ? 0 : h) * (blocks + 1) + i / block;
      TAB_ROLLED
      for (int e = row[0]; e < row[1]; ++e)
        bits |= span(col[e] * block, least(col[e] * block + block, n) - 1);
    } else if (cols > 0) {
      const int y = i / cols, x = i % cols, first = x > left ? x - left : 0;
      const uint64_t across = span(first, least(x + right, cols - 1));
      TAB_ROLLED
      for (int r = y > left ? y - left : 0; r <= least(y + right, rows - 1); ++r)
        bits |= across << (r * cols);
    } else {
      bits = span(i > left ? i - left : 0, least(i + right, n - 1));
    }
    if (mask != nullptr) {
      const Tokens real = this->real(b);
      TAB_ROLLED
      for (int j = 0; j < n; ++j)
        if (!real(j)) bits &= ~(uint64_t{1} << j);
    }
    return causal ? bits & span(0, i) : bits;
  }

  /// rows[i] for i < 64, by the first two warps
  TAB_DEVICE void all(uint64_t* rows_seen, int b, int h) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i < SIDE) rows_seen[i] = i < n ? (*this)(b, h, i) : 0;
  }
};

/// s = scale·s where seen, −∞ elsewhere
template <typename P>
TAB_DEVICE void mask(P& s, const uint64_t* seen, float scale) {
  TAB_UNROLL
  for (int e = 0; e < 32; ++e) {
    const bool sees = seen[s.row(s.which(e))] >> s.column(e) & 1;
    s.x[e] = sees ? s.x[e] * scale : -INFINITY;
  }
}

/// s (masked) becomes exp(s − top of its row) ≤ 1; `inverse` 1/its row's sum. A row that sees
/// nothing is 0. lse (N) = top + log(sum).
template <typename P>
TAB_DEVICE void softmax(P& s, float* lse, int n, float (&inverse)[P::ROWS]) {
  float top[P::ROWS], sum[P::ROWS];
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) top[r] = -INFINITY, sum[r] = 0;
  TAB_UNROLL
  for (int e = 0; e < 32; ++e) top[s.which(e)] = fmaxf(top[s.which(e)], s.x[e]);
  top_lanes<P>(top);
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) top[r] = top[r] == -INFINITY ? 0.0f : top[r];
  TAB_UNROLL
  for (int e = 0; e < 32; ++e) {
    s.x[e] = expf(s.x[e] - top[s.which(e)]);
    sum[s.which(e)] += s.x[e];
  }
  add_lanes<P>(sum);
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    const int i = s.row(r);
    inverse[r] = sum[r] == 0 ? 0.0f : 1 / sum[r];
    if (lane() % P::LANES == 0 && i < n) lse[i] = top[r] + logf(sum[r]);
  }
}

template <typename T>
struct SoftmaxForward {
  int heads, d, dv;
  float scale;
  Sees sees;
  Heads<const T> q, k, v;
  Heads<T> o;
  float* lse;

  static constexpr int THREADS = few::THREADS;
  static constexpr int BLOCKS = 4;  // that fit a multiprocessor: at most 128 registers a thread
  static constexpr int64_t BYTES = 3 * TILE<T> * sizeof(T) + SIDE * sizeof(uint64_t);

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const seen = reinterpret_cast<uint64_t*>(memory);
    T* const x = reinterpret_cast<T*>(seen + SIDE);
    T *const y = x + TILE<T>, *const z = y + TILE<T>;
    const int bh = static_cast<int>(blockIdx.x), n = sees.n;
    const T *const qs = q.at(bh, heads), *const ks = k.at(bh, heads), *const vs = v.at(bh, heads);
    sees.all(seen, bh / heads, bh % heads);
    load(z, vs, v.n, n, columns(dv, 0));
    Part<T, true> s;
    for (int c = 0; c < d; c += SIDE) {
      if (c > 0) __syncthreads();
      load(x, qs + c, q.n, n, columns(d, c));
      load(y, ks + c, k.n, n, columns(d, c));
      __syncthreads();
      multiply<false>(s, x, y, n, columns(d, c));
    }
    float inverse[Part<T, true>::ROWS];
    mask(s, seen, scale);
    softmax(s, lse + static_cast<int64_t>(bh) * n, n, inverse);
    __syncwarp();  // over Q: a warp reads and writes its own rows only
    keep(s, x);
    __syncwarp();
    for (int c = 0; c < dv; c += SIDE) {
      if (c > 0) {
        __syncthreads();
        load(z, vs + c, v.n, n, columns(dv, c));
        __syncthreads();
      }
      Part<T, false> out;
      multiply<false>(out, x, z, n, n);
      write(out, o.at(bh, heads) + c, o.n, n, columns(dv, c), inverse);
    }
  }
};

}  // namespace tab::few
