// Softmax attention of one (batch, head) with N ≤ 64 tokens, backward (softmax.cuh).
//
//   P = exp(S − L),  Δ = Σ_j P∘(dO Vᵀ),  dS = P∘(dO Vᵀ − Δ),  dV = PᵀdO,  dQ = scale·dS K,
//   dK = scale·dSᵀQ
//
// Δ is summed from P and dP, which are here, and o is not read.
//
// Floor at B 512 H 8 N 64 D 64 (4.3 TB/s; 60 TFLOP/s FMA), predicted: float32 109 µs for 7 tensors,
// 179 for 10.7 GFLOP.
#pragma once

#include "softmax.cuh"

namespace tab::few {

/// From s (masked) and dp = dO Vᵀ: s becomes P = exp(s − lse), dp becomes P∘(dp − Δ).
/// Δ = Σ_j P∘dp − dlse (dlse may be null). P is 0 in the rows of other queries.
template <typename P>
TAB_DEVICE void softmax_backward(P& s, P& dp, const float* lse, const float* dlse,
                                 const Tokens& queries) {
  float delta[P::ROWS], l[P::ROWS];
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    const int i = s.row(r);
    l[r] = queries(i) ? lse[i] : INFINITY;
    l[r] = l[r] == -INFINITY ? 0.0f : l[r];
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
    if (dlse != nullptr && queries(s.row(r))) delta[r] -= dlse[s.row(r)];
  TAB_UNROLL
  for (int e = 0; e < 32; ++e) dp.x[e] = s.x[e] * (dp.x[e] - delta[s.which(e)]);
}

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
