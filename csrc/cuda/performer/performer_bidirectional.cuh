// FAVOR+ of one (batch, head) with N ≤ 64 tokens, all on chip, bidirectional.
//
//   b = s·q Wᵀ, a = s·k Wᵀ − s²‖k‖²/2, s = D^(-1/4);  c_m = max_j a_jm
//   φ(k) = e^(a − c), S = φ(k)ᵀv, z = Σφ(k), φ(q) = e^(b + c − r), r its row's maximum
//   o = φ(q) S / (φ(q) z + ε),  lse = r + log(φ(q) z + ε)          (tab/ops/performer.py)
//
// Features come 64 at a time: to the query they are what keys are in softmax attention, with c as
// bias, S as values and z as weights, so its maximum r is found online. The kernel "relu" has c = 0
// and r = 0 and relu in place of both exponentials.
//
// Floors at B 512 H 8 N 64 D 64 M 256 (4.3 TB/s; 60 TFLOP/s FMA), predicted: forward float32 125 µs
// for q, k, v, o and the state S, which the contract returns, 573 µs for 34 GFLOP; half types 94 µs
// for memory, 52 GFLOP on tensor cores and 37 µs of exp.
#pragma once

#include "performer.cuh"

namespace tab::few {

template <typename T>
struct PerformerBidirectionalForward {
  Performer<T> in;
  float eps;
  Heads<T> o;
  float *s, *z, *c, *lse;  // (B, H, M, Dv), (B, H, M) twice, (B, H, N)

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  static constexpr int64_t BYTES = 5 * TILE<T> * sizeof(T) + 6 * SIDE * sizeof(float);

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const norms = reinterpret_cast<float*>(memory);
    float *const sums = norms + SIDE, *const tops = sums + SIDE;  // (64) each, (4, 64)
    T* const x = reinterpret_cast<T*>(tops + 4 * SIDE);
    T *const y = x + TILE<T>, *const v = y + TILE<T>, *const f = v + TILE<T>;
    T* const g = f + TILE<T>;
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.n, m = in.m;
    const int64_t features = static_cast<int64_t>(bh) * m;
    const T* const ks = in.k.at(bh, heads);
    const float scale = in.scale();
    dots(norms, ks, in.k.n, ks, in.k.n, n, in.d, scale * scale / 2);
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      load<2>(v, in.v.at(bh, heads) + c0, in.v.n, in.real(bh), width);
      using Out = Part<T, false>;
      Out out;
      float top[Out::ROWS], den[Out::ROWS];
      TAB_UNROLL
      for (int r = 0; r < Out::ROWS; ++r) top[r] = in.relu ? 0.0f : -INFINITY, den[r] = 0;
      for (int m0 = 0; m0 < m; m0 += SIDE) {
        const int count = columns(m, m0);
        Part<T, true> a, b;
        const bool first = c0 == 0 && m0 == 0;
        in.project(a, ks, in.k.n, in.real(bh), y, f, g, m0, first, false);
        in.project(b, in.q.at(bh, heads), in.q.n, n, x, f, g, m0, first, true);
        in.exponents(a, norms, bh);
        tops_of_columns(a, tops);
        __syncthreads();
        keys(a, tops);
        keep(a, f);
        __syncthreads();
        {
          Out state;  // (features, columns of v)
          multiply<true>(state, f, v, count, n);
          write(state, s + (features + m0) * in.dv + c0, in.dv, count, width);
          keep(state, g);
        }
        if (threadIdx.x < SIDE) {
          const int j = static_cast<int>(threadIdx.x);
          float sum = 0;
          for (int i = 0; i < n; ++i) sum += wide(f[i * LINE<T> + j]);
          sums[j] = sum;
          if (c0 == 0 && j < count) {
            z[features + m0 + j] = sum;
            c[features + m0 + j] = in.relu ? 0.0f : top_of(tops, j);
          }
        }
        __syncthreads();
        queries(b, tops, sums, count, scale, out, top, den);
        keep(b, f);  // a warp reads its own rows only
        __syncwarp();
        multiply<false>(out, f, g, n, count);
      }
      finish(out, top, den, eps, c0 == 0 ? lse + static_cast<int64_t>(bh) * n : nullptr,
             o.at(bh, heads) + c0, o.n, n, width);
    }
  }

  static TAB_DEVICE float top_of(const float* tops, int j) {
    return fmaxf(fmaxf(tops[j], tops[SIDE + j]), fmaxf(tops[2 * SIDE + j], tops[3 * SIDE + j]));
  }

  /// tops[warp][j] = max over the warp's tokens of a_j
  static TAB_DEVICE void tops_of_columns(const Part<T, true>& a, float* tops) {
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      if (a.which(e) != 0) continue;  // e stands for its column
      float top = -INFINITY;
      TAB_UNROLL
      for (int other = 0; other < 32; ++other)
        if (a.column(other) == a.column(e)) top = fmaxf(top, a.x[other]);
      TAB_UNROLL
      for (int mask = Part<T, true>::LANES; mask < WARP; mask *= 2)
        top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, mask));
      if (lane() < Part<T, true>::LANES) tops[warp() * SIDE + a.column(e)] = top;
    }
  }

  /// a -> φ(k)
  TAB_DEVICE void keys(Part<T, true>& a, const float* tops) const {
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const float top = top_of(tops, a.column(e));
      a.x[e] = in.relu ? rectified(a.x[e]) : expf(a.x[e] - finite(top));
    }
  }

  /// b -> φ(q) relative to the maximum so far; what was summed before is rescaled.
  TAB_DEVICE void queries(Part<T, true>& b, const float* tops, const float* sums, int count,
                          float scale, Part<T, false>& out, float (&top)[Part<T, true>::ROWS],
                          float (&den)[Part<T, true>::ROWS]) const {
    using P = Part<T, true>;
    float highest[P::ROWS];
    TAB_UNROLL
    for (int r = 0; r < P::ROWS; ++r) highest[r] = top[r];
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int j = b.column(e);
      b.x[e] = j < count ? b.x[e] * scale + (in.relu ? 0.0f : top_of(tops, j)) : -INFINITY;
      if (!in.relu) highest[b.which(e)] = fmaxf(highest[b.which(e)], b.x[e]);
    }
    top_lanes<P>(highest);
    TAB_UNROLL
    for (int r = 0; r < P::ROWS; ++r) {
      const float before = top[r], base = finite(highest[r]);
      const float factor = in.relu ? 1.0f : expf(before - base);
      top[r] = highest[r], highest[r] = base;
      den[r] *= factor;
      TAB_UNROLL
      for (int e = 0; e < 32; ++e)
        if (out.which(e) == r) out.x[e] *= factor;
    }
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      b.x[e] = in.relu ? rectified(b.x[e]) : expf(b.x[e] - highest[b.which(e)]);
      den[b.which(e)] += b.x[e] * sums[b.column(e)];
    }
  }
};

}  // namespace tab::few
