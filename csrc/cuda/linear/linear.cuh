// Linear attention of one (batch, head) with N ≤ 64 tokens, all on chip: the arithmetic of linear.cu.
//
//   o_i = (Σ_j P_ij v_j + φ(q_i)S₀) / (Σ_j P_ij + φ(q_i)z₀ + ε),  P = φ(q)φ(k)ᵀ where i sees j
//   S = S₀ + φ(k)ᵀv,  z = z₀ + Σφ(k)                                   (formula: tab/ops/linear.py)
//
// The quadratic order: of as few tokens, P costs what φ(q)S does, and causal is a mask. Tiles are
// float for every type, since sums of features outgrow float16; products are FMA (tile.cuh).
//
// Floors at B 512 H 8 N 64 D 64 (4.3 TB/s; 60 TFLOP/s FMA), predicted: forward float32 78 µs for 5
// tensors, 107 for 6.4 GFLOP; backward 125 for 8 tensors, 215 for 13 GFLOP.
#pragma once

#include "../core/tile.cuh"

namespace tab::few {

TAB_DEVICE float phi(float x, int map) {
  if (map == 0) return x > 0 ? x + 1 : expf(x);
  return map == 1 ? rectified(x) : x;
}

/// φ'(x) from f = φ(x): for elu + 1 it is 1 above f = 1 and f itself below. NaN where f is.
TAB_DEVICE float slope(float f, int map) {
  if (map == 0) return f > 1 ? 1.0f : f;
  return map == 1 && !(f > 0) ? f * 0.0f : 1.0f;
}

/// What both directions read.
template <typename T>
struct Linear {
  int heads, n, d, dv, feature_map, causal;
  float eps;
  const uint8_t* mask;  // (B, N) or null
  Heads<const T> q, k, v;
  const float *s0, *z0;  // (B, H, D, Dv), (B, H, D), or null

  using Pairs = Part<float, true>;

  TAB_DEVICE Tokens real(int bh) const { return Tokens::of(n, mask, bh / heads); }
  TAB_DEVICE bool sees(int i, int j) const { return i < n && j < n && (!causal || j <= i); }

  /// Columns c and after of φ(q), for these tokens, and of φ(k)
  TAB_DEVICE void load_q(float* to, const Tokens& tokens, int bh, int c) const {
    const int map = feature_map;
    load<2>(to, q.at(bh, heads) + c, q.n, tokens, columns(d, c),
            [map](float x, int, int) { return phi(x, map); });
  }
  TAB_DEVICE void load_k(float* to, int bh, int c) const {
    const int map = feature_map;
    load<2>(to, k.at(bh, heads) + c, k.n, real(bh), columns(d, c),
            [map](float x, int, int) { return phi(x, map); });
  }

  /// p += the columns c and after of φ(q)φ(k)ᵀ, den += their φ(q)z₀; the tiles are loaded first.
  TAB_DEVICE void pairs(Pairs& p, float (&den)[Pairs::ROWS], float* queries, float* keys,
                        const Tokens& tokens, int bh, int c) const {
    const int width = columns(d, c);
    load_q(queries, tokens, bh, c);
    load_k(keys, bh, c);
    __syncthreads();
    multiply<false>(p, queries, keys, n, width);
    if (z0 == nullptr) return;
    const float* const z = z0 + static_cast<int64_t>(bh) * d + c;
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int j = p.column(e);
      if (j < width) den[p.which(e)] += queries[p.row(p.which(e)) * LINE<float> + j] * z[j];
    }
  }

  /// Once all columns are in: p is 0 where i does not see j, and inverse 1/denominator.
  TAB_DEVICE void divide(Pairs& p, const float (&den)[Pairs::ROWS],
                         float (&inverse)[Pairs::ROWS]) const {
    float sum[Pairs::ROWS];
    TAB_UNROLL
    for (int r = 0; r < Pairs::ROWS; ++r) sum[r] = den[r];
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      if (!sees(p.row(p.which(e)), p.column(e))) p.x[e] = 0;
      sum[p.which(e)] += p.x[e];
    }
    add_lanes<Pairs>(sum);
    TAB_UNROLL
    for (int r = 0; r < Pairs::ROWS; ++r)
      inverse[r] = sum[r] + eps == 0 ? 0.0f : 1 / (sum[r] + eps);
  }
};

template <typename T>
struct LinearForward {
  Linear<T> in;
  Heads<T> o;
  float *s, *z;

  static constexpr int THREADS = few::THREADS, BLOCKS = 3;
  static constexpr int64_t BYTES = 4 * TILE<float> * sizeof(float);
  using Out = Part<float, false>;

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const x = reinterpret_cast<float*>(memory);
    float *const y = x + TILE<float>, *const v = y + TILE<float>, *const w = v + TILE<float>;
    const int bh = static_cast<int>(blockIdx.x), n = in.n;
    typename Linear<T>::Pairs p;
    float den[Out::ROWS] = {}, inverse[Out::ROWS];
    for (int d0 = 0; d0 < in.d; d0 += SIDE) {
      if (d0 > 0) __syncthreads();
      in.pairs(p, den, x, y, n, bh, d0);
      state(y, v, bh, d0);
    }
    in.divide(p, den, inverse);
    keep(p, w);  // a warp reads and writes its own rows only
    __syncwarp();
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      if (in.dv > SIDE) {
        __syncthreads();
        load_v(v, bh, c0);
        __syncthreads();
      }
      Out out;
      multiply<false>(out, w, v, n, n);
      for (int d0 = 0; in.s0 != nullptr && d0 < in.d; d0 += SIDE) {
        const int64_t row = static_cast<int64_t>(bh) * in.d + d0;
        __syncthreads();
        if (in.d > SIDE) in.load_q(x, n, bh, d0);
        load<2>(y, in.s0 + row * in.dv + c0, in.dv, columns(in.d, d0), width);
        __syncthreads();
        multiply<false>(out, x, y, n, columns(in.d, d0));
      }
      write(out, o.at(bh, in.heads) + c0, o.n, n, width, inverse);
    }
  }

  TAB_DEVICE void load_v(float* to, int bh, int c) const {
    load<2>(to, in.v.at(bh, in.heads) + c, in.v.n, in.real(bh), columns(in.dv, c));
  }

  /// Rows d0 and after of S and z; v is left there if it is one tile.
  TAB_DEVICE void state(const float* keys, float* v, int bh, int d0) const {
    const int count = columns(in.d, d0), j = static_cast<int>(threadIdx.x);
    const int64_t row = static_cast<int64_t>(bh) * in.d + d0;
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      if (c0 > 0) __syncthreads();
      if (d0 == 0 || in.dv > SIDE) load_v(v, bh, c0);
      __syncthreads();
      Out part;
      multiply<true>(part, keys, v, count, in.n);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int i = part.row(part.which(e)), c = c0 + part.column(e);
        if (in.s0 && i < count && c < in.dv) part.x[e] += in.s0[(row + i) * in.dv + c];
      }
      write(part, s + row * in.dv + c0, in.dv, count, columns(in.dv, c0));
    }
    if (j >= count) return;
    float sum = in.z0 ? in.z0[row + j] : 0.0f;
    for (int i = 0; i < in.n; ++i) sum += keys[i * LINE<float> + j];
    z[row + j] = sum;
  }
};

}  // namespace tab::few
