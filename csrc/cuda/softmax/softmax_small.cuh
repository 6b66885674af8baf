// Softmax attention of one (batch, head) with N ≤ 64 tokens, all on chip: local and sparse.
//
//   S = scale·QKᵀ (−∞ where not seen),  L = log Σ_j exp S_j,  O = exp(S − L) V   (tab/ops/_softmax.py)
//   P = exp(S − L),  Δ = Σ_j P∘(dO Vᵀ),  dS = P∘(dO Vᵀ − Δ),  dV = PᵀdO,  dQ = scale·dS K,
//   dK = scale·dSᵀQ
//
// A block computes one (batch, head). Which keys a query sees is 64 bits, so every pattern is the
// same kernel. S and P stay in registers; Q, K, V and dO pass through tiles of 64 columns, so any D
// fits. Δ is summed from P and dP, which are here, and o is not read.
//
// Floors at B 512 H 8 N 64 D 64 (4.3 TB/s; 60 TFLOP/s FMA), predicted: forward float32 62 µs for 4
// tensors, 72 for 4.3 GFLOP; backward 109 for 7 tensors, 179 for 10.7 GFLOP. Half types: half the
// bytes, and tensor cores do the FLOPs in a tenth of that, so memory counts.
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
      TAB_ROLLED
      for (int j = 0; j < n; ++j)
        if (mask[static_cast<int64_t>(b) * n + j] == 0) bits &= ~(uint64_t{1} << j);
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
    inverse[r] = sum[r] > 0 ? 1 / sum[r] : 0.0f;
    if (lane() % P::LANES == 0 && i < n) lse[i] = top[r] + logf(sum[r]);
  }
}

/// From s (masked) and dp = dO Vᵀ: s becomes P = exp(s − lse), dp becomes P∘(dp − Δ).
/// Δ = Σ_j P∘dp − dlse (dlse may be null).
template <typename P>
TAB_DEVICE void softmax_backward(P& s, P& dp, const float* lse, const float* dlse, int n) {
  float delta[P::ROWS], l[P::ROWS];
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    const int i = s.row(r);
    l[r] = i < n && lse[i] != -INFINITY ? lse[i] : 0.0f;
    delta[r] = 0;
  }
  TAB_UNROLL
  for (int e = 0; e < 32; ++e) {
    s.x[e] = expf(s.x[e] - l[s.which(e)]);
    delta[s.which(e)] += s.x[e] * dp.x[e];
  }
  add_lanes<P>(delta);
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r)
    if (dlse != nullptr && s.row(r) < n) delta[r] -= dlse[s.row(r)];
  TAB_UNROLL
  for (int e = 0; e < 32; ++e) dp.x[e] = s.x[e] * (dp.x[e] - delta[s.which(e)]);
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

template <typename T>
struct SoftmaxBackward {
  int heads, d, dv;
  float scale;
  Sees sees;
  Heads<const T> dout, q, k, v;
  const float* lse;
  Heads<T> dq, dk, dv_out;

  static constexpr int THREADS = few::THREADS, BLOCKS = 3;
  static constexpr int64_t BYTES = 4 * TILE<T> * sizeof(T) + SIDE * sizeof(uint64_t);

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const seen = reinterpret_cast<uint64_t*>(memory);
    T* const x = reinterpret_cast<T*>(seen + SIDE);
    T *const y = x + TILE<T>, *const u = y + TILE<T>, *const w = u + TILE<T>;
    const int bh = static_cast<int>(blockIdx.x), n = sees.n;
    const T *const qs = q.at(bh, heads), *const ks = k.at(bh, heads), *const vs = v.at(bh, heads);
    const T* const gs = dout.at(bh, heads);
    sees.all(seen, bh / heads, bh % heads);
    Part<T, true> p, ds;
    for (int c = 0; c < d || c < dv; c += SIDE) {
      if (c > 0) __syncthreads();
      if (c < d) {
        load(x, qs + c, q.n, n, columns(d, c));
        load(y, ks + c, k.n, n, columns(d, c));
      }
      if (c < dv) {
        load(u, gs + c, dout.n, n, columns(dv, c));
        load(w, vs + c, v.n, n, columns(dv, c));
      }
      __syncthreads();
      if (c < d) multiply<false>(p, x, y, n, columns(d, c));
      if (c < dv) multiply<false>(ds, u, w, n, columns(dv, c));
    }
    const float* const none = nullptr;
    mask(p, seen, scale);
    softmax_backward(p, ds, lse + static_cast<int64_t>(bh) * n, none, n);
    __syncthreads();
    keep(p, w);
    __syncthreads();
    for (int c = 0; c < dv; c += SIDE) {
      if (dv > SIDE) {
        if (c > 0) __syncthreads();
        load(u, gs + c, dout.n, n, columns(dv, c));
        __syncthreads();
      }
      Part<T, false> out;
      multiply<true>(out, w, u, n, n);
      write(out, dv_out.at(bh, heads) + c, dv_out.n, n, columns(dv, c));
    }
    __syncthreads();
    keep(ds, w);
    __syncthreads();
    for (int c = 0; c < d; c += SIDE) {
      if (d > SIDE) {
        if (c > 0) __syncthreads();
        load(x, qs + c, q.n, n, columns(d, c));
        load(y, ks + c, k.n, n, columns(d, c));
        __syncthreads();
      }
      Part<T, false> to_q, to_k;
      multiply<false>(to_q, w, y, n, n);
      multiply<true>(to_k, w, x, n, n);
      write(to_q, dq.at(bh, heads) + c, dq.n, n, columns(d, c), scale);
      write(to_k, dk.at(bh, heads) + c, dk.n, n, columns(d, c), scale);
    }
  }
};

}  // namespace tab::few
