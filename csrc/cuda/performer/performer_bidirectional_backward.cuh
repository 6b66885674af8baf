// FAVOR+ of one (batch, head) with N ≤ 64 tokens, all on chip, backward. Forward:
// performer_bidirectional.cuh.
//
// Backward takes the quadratic order, which needs no S: with φ(q) divided by the denominator,
//   P = φ(q)φ(k)ᵀ, G = do vᵀ − do·o, db = (G φ(k))∘φ(q), da = (Gᵀφ(q))∘φ(k),
//   dv = Pᵀdo, dq = s·db W, dk = s·(da W − (Σ_m da)·s·k)
//
// Predicted floor at B 512 H 8 N 64 D 64 M 256 (60 TFLOP/s FMA): float32 1 ms for 60 GFLOP.
#pragma once

#include "performer_bidirectional.cuh"

namespace tab::few {

template <typename T>
struct PerformerBidirectionalBackward {
  Performer<T> in;
  Heads<const T> dout, o;
  const float *c, *lse;  // (B, H, M), (B, H, N)
  Heads<T> dq, dk, dv;

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  static constexpr int64_t BYTES =
      (Performer<T>::SPLIT ? 7 : 6) * TILE<T> * sizeof(T) + 2 * SIDE * sizeof(float) + SIDE;

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const norms = reinterpret_cast<float*>(memory);
    float* const delta = norms + SIDE;
    auto* const room = reinterpret_cast<uint8_t*>(delta + SIDE);
    T* const x = reinterpret_cast<T*>(room + SIDE);
    T *const y = x + TILE<T>, *const w = y + TILE<T>, *const f = w + TILE<T>;
    T *const h = f + TILE<T>, *const g = h + TILE<T>;
    T* const low = g + TILE<T>;         // half types only
    T* const dbs = in.SPLIT ? low : x;  // whose other readers have passed a barrier
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.n, m = in.m;
    const T *const ks = in.k.at(bh, heads), *const gs = dout.at(bh, heads);
    const float scale = in.scale();
    dots(norms, ks, in.k.n, ks, in.k.n, n, in.d, scale * scale / 2);
    const Tokens queries = heard(room, in.real(bh), gs, dout.n, in.dv);
    dots(delta, gs, dout.n, o.at(bh, heads), o.n, queries, in.dv, 1.0f);
    {
      Part<T, true> part;
      for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
        if (c0 > 0) __syncthreads();
        load<2>(x, gs + c0, dout.n, n, columns(in.dv, c0));
        load<2>(y, in.v.at(bh, heads) + c0, in.v.n, in.real(bh), columns(in.dv, c0));
        __syncthreads();
        multiply<false>(part, x, y, n, columns(in.dv, c0));
      }
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) part.x[e] -= delta[part.row(part.which(e))];
      keep(part, g);
    }
    Part<T, true> p;
    for (int d0 = 0; d0 < in.d; d0 += SIDE) {
      const int width = columns(in.d, d0);
      Part<T, false> to_q, to_k;
      float total[Part<T, false>::ROWS] = {};
      for (int m0 = 0; m0 < m; m0 += SIDE) {
        const int count = columns(m, m0);
        const bool first = d0 == 0 && m0 == 0;
        {
          Part<T, true> a;
          in.project(a, ks, in.k.n, in.real(bh), y, w, low, m0, first, false);
          in.exponents(a, norms, bh);
          in.key_features(a, c, bh, m0);
          keep(a, f);
        }
        {
          Part<T, true> b;
          in.project(b, in.q.at(bh, heads), in.q.n, queries, x, w, low, m0, first || !in.SPLIT,
                     true);
          in.query_features(b, c, lse, queries, bh, m0, false);
          keep(b, h);
        }
        __syncthreads();
        if (d0 == 0) multiply<false>(p, h, f, n, count);
        {
          Part<T, false> da, db;
          multiply<false>(db, g, f, n, n);
          in.slopes(db, h, lse + static_cast<int64_t>(bh) * n);
          keep(db, dbs);
          multiply<true>(da, g, h, n, n);
          in.slopes(da, f, nullptr);
          TAB_UNROLL
          for (int e = 0; e < 32; ++e) total[da.which(e)] += da.x[e];
          __syncthreads();
          keep(da, f);
        }
        if (in.d > SIDE) {
          load<2>(w, in.w + static_cast<int64_t>(m0) * in.d + d0, in.d, count, width);
          __syncthreads();
        } else {
          __syncwarp();  // a warp reads its own rows of f and dbs only
        }
        multiply<false>(to_q, dbs, w, n, count);
        multiply<false>(to_k, f, w, n, count);
      }
      add_lanes<Part<T, false>>(total);
      write(to_q, dq.at(bh, heads) + d0, dq.n, n, width, scale);
      if (in.d > SIDE) {
        load<2>(y, ks + d0, in.k.n, in.real(bh), width);
        __syncthreads();
      }
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int r = to_k.which(e), at = to_k.row(r) * LINE<T> + to_k.column(e);
        if (!in.relu) to_k.x[e] -= total[r] * scale * wide(y[at]);
      }
      write(to_k, dk.at(bh, heads) + d0, dk.n, n, width, scale);
    }
    __syncthreads();
    keep(p, f);
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      if (c0 > 0) __syncthreads();
      load<2>(x, gs + c0, dout.n, n, columns(in.dv, c0));
      __syncthreads();
      Part<T, false> out;
      multiply<true>(out, f, x, n, n);
      write(out, dv.at(bh, heads) + c0, dv.n, n, columns(in.dv, c0));
    }
  }
};

}  // namespace tab::few
