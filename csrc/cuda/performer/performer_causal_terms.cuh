// What the backward pass of performer_causal.cuh computes again, a tile of 64 features at a time: the
// features of queries and keys, and what the states before and after the tokens give to their slopes.
// Symbols: performer_causal_backward.cuh
#pragma once

#include "performer_causal.cuh"

namespace tab::few {

template <typename T>
struct PerformerCausalTerms {
  Performer<T, float> in;
  int causal;
  State from, grad;  // of grad, c is that of the forward pass and never null
  Heads<const T> dout, o;
  const float* lse;

  static constexpr int64_t BYTES = (6 * TILE<float> + 4 * SIDE) * sizeof(float) + SIDE;
  using Pairs = Part<float, true>;

  struct Tiles {
    float *norms, *delta, *tops, *starts;  // tops: c, starts: c₀
    float *x, *w, *keys, *queries, *pairs, *sum;
    Tokens heard{0};
    TAB_DEVICE explicit Tiles(float* memory) {
      norms = memory, delta = norms + SIDE, tops = delta + SIDE, starts = tops + SIDE;
      x = starts + SIDE, w = x + TILE<float>, keys = w + TILE<float>;
      queries = keys + TILE<float>, pairs = queries + TILE<float>, sum = pairs + TILE<float>;
    }
  };

  TAB_DEVICE bool sees(int i, int j) const { return i < in.n && j < in.n && (!causal || j <= i); }

  /// part += X Yᵀ for rows of Dv columns, by way of sum and w, which no thread still reads
  template <typename Y>
  TAB_DEVICE void times(Pairs& part, const Tiles& t, const T* x, int64_t stride, const Tokens& of_x,
                        const Y* y, int64_t y_stride, const Tokens& of_y) const {
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      __syncthreads();
      load<2>(t.sum, x + c0, stride, of_x, width);
      load<2>(t.w, y + c0, y_stride, of_y, width);
      __syncthreads();
      multiply<false>(part, t.sum, t.w, in.n, width);
    }
  }

  /// x = φ(k), keys = a; queries = e^(b + c − lse) or, if a query is far, b − lse. Whether one is.
  TAB_DEVICE bool features(const Tiles& t, int bh, int m0) const {
    const int count = columns(in.m, m0), j = static_cast<int>(threadIdx.x);
    const int64_t all = static_cast<int64_t>(bh) * in.m + m0;
    Pairs a, b;
    in.project(a, in.k.at(bh, in.heads), in.k.n, in.real(bh), t.x, t.w, t.w, m0, true, false);
    in.exponents(a, t.norms, bh);
    keep(a, t.keys);
    in.project(b, in.q.at(bh, in.heads), in.q.n, t.heard, t.x, t.w, t.w, m0, true, true);
    bool far = false;
    if (j < SIDE) {
      t.starts[j] = j < count ? from.shift(all + j, in.relu) : -INFINITY;
      t.tops[j] = j < count ? grad.c[all + j] : -INFINITY;
      far = causal && !in.relu && j < count && t.tops[j] - fmaxf(t.starts[j], t.keys[j]) > FAR;
    }
    far = __syncthreads_or(far);
    in.query_features(b, grad.c, lse, t.heard, bh, m0, far);
    keep(b, t.queries);
    take(a, t.keys);
    in.key_features(a, grad.c, bh, m0);
    keep(a, t.x);
    __syncthreads();
    return far;
  }

  /// e^(c₀ − c)
  TAB_DEVICE float factor(const Tiles& t, int j) const {
    return in.relu ? 1.0f : expf(t.starts[j] - finite(t.tops[j]));
  }

  /// φ(q_i)_j at the shift c₀
  template <bool NEAR>
  TAB_DEVICE float start_feature(const Tiles& t, int i, int j) const {
    const float b = t.queries[i * LINE<float> + j];
    return NEAR ? b * factor(t, j) : expf(b + t.starts[j]);
  }

  /// sum = φ(q)∘(do S₀ᵀ − δ z₀)
  template <bool NEAR>
  TAB_DEVICE void from_initial(const Tiles& t, int64_t all, int count, int bh) const {
    const float* const log_den = lse + static_cast<int64_t>(bh) * in.n;
    Pairs u;
    times(u, t, dout.at(bh, in.heads), dout.n, in.n, from.s + all * in.dv, in.dv, count);
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int i = u.row(u.which(e)), j = u.column(e);
      const bool inside = i < in.n && j < count;
      const float read = inside ? u.x[e] - t.delta[i] * from.z[all + j] : 0.0f;
      u.x[e] = inside ? in.slope(start_feature<NEAR>(t, i, j), log_den, i) * read : 0.0f;
    }
    __syncwarp();  // of sum, a warp reads and writes its own rows only
    keep(u, t.sum);
  }

  /// sum = φ(k)∘(v dSᵀ + dz)
  TAB_DEVICE void from_final(const Tiles& t, int64_t all, int count, int bh) const {
    Pairs u;
    times(u, t, in.v.at(bh, in.heads), in.v.n, in.real(bh), grad.s + all * in.dv, in.dv, count);
    TAB_UNROLL
    for (int e = 0; e < 32; ++e)
      if (u.column(e) < count) u.x[e] += grad.z[all + u.column(e)];
    in.slopes(u, t.x, nullptr);
    __syncwarp();
    keep(u, t.sum);
  }
};

}  // namespace tab::few
