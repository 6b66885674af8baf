// What the performer's kernels for N ≤ 64 share: projections, features, their slopes. Formula and
// symbols: performer_bidirectional.cuh. Half types: W is the sum of two numbers of that type, so that
// exponents are as exact as with the float32 W.
#pragma once

#include "../core/tile.cuh"

namespace tab::few {

/// The shift of nothing, −∞, as 0
TAB_DEVICE float finite(float shift) { return shift == -INFINITY ? 0.0f : shift; }

/// What both directions read. Tiles hold E.
template <typename T, typename E = T>
struct Performer {
  int heads, n, d, dv, m, relu;
  const uint8_t* mask;  // (B, N) or null
  const float* w;       // (M, D)
  Heads<const T> q, k, v;

  static constexpr bool SPLIT = !std::is_same_v<E, float>;

  TAB_DEVICE float scale() const { return rsqrtf(sqrtf(static_cast<float>(d))); }
  TAB_DEVICE Tokens real(int bh) const { return Tokens::of(n, mask, bh / heads); }
  /// W[from m0, from c] into `high` and, for half types, what that leaves into `low`.
  TAB_DEVICE void load_w(E* high, E* low, int m0, int c) const {
    const float* const from = w + static_cast<int64_t>(m0) * d + c;
    load<2>(high, from, d, columns(m, m0), columns(d, c));
    if constexpr (SPLIT) {
      load<2>(low, from, d, columns(m, m0), columns(d, c), [](float x, int, int) {
        E rounded;
        narrow(x, &rounded);
        return x - wide(rounded);
      });
    }
  }

  /// out = X Wᵀ for the tokens x and the features m0 and after, not yet scaled. If D fits one tile,
  /// `tile` is to hold X from the `first` call on, and W what a call with `same_w` finds there from
  /// the one before; else both are loaded piece by piece. All threads may be using the tiles before.
  TAB_DEVICE void project(Part<E, true>& out, const T* x, int64_t stride, const Tokens& tokens,
                          E* tile, E* high, E* low, int m0, bool first, bool same_w) const {
    for (int c = 0; c < d; c += SIDE) {
      if (first || !same_w || d > SIDE) {
        __syncthreads();
        if (first || d > SIDE) load<2>(tile, x + c, stride, tokens, columns(d, c));
        if (!same_w || d > SIDE) load_w(high, low, m0, c);
        __syncthreads();
      }
      multiply<false>(out, tile, high, n, columns(d, c));
      if constexpr (SPLIT) multiply<false>(out, tile, low, n, columns(d, c));
    }
  }

  /// Scales a and takes s²‖k‖²/2 off; −∞ where there is no key.
  TAB_DEVICE void exponents(Part<E, true>& a, const float* norms, int bh) const {
    const float s = scale();
    const Tokens tokens = real(bh);
    bool there[Part<E, true>::ROWS];
    float norm[Part<E, true>::ROWS];
    TAB_UNROLL
    for (int r = 0; r < Part<E, true>::ROWS; ++r) {
      there[r] = tokens(a.row(r));
      norm[r] = relu ? 0.0f : norms[a.row(r)];
    }
    TAB_UNROLL
    for (int e = 0; e < 32; ++e)
      a.x[e] = there[a.which(e)] ? s * a.x[e] - norm[a.which(e)] : -INFINITY;
  }

  // Features again, from the shift c (B, H, M) and lse (B, H, N) of the forward pass.

  /// a -> φ(k), zero where there is no token or feature
  TAB_DEVICE void key_features(Part<E, true>& a, const float* c, int bh, int m0) const {
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int j = m0 + a.column(e);
      const float shift = j < m ? c[static_cast<int64_t>(bh) * m + j] : 0.0f;
      const float phi = relu ? rectified(a.x[e]) : expf(a.x[e] - finite(shift));
      a.x[e] = j < m ? phi : 0.0f;
    }
  }

  /// b, as projected -> φ(q) by its denominator; `bare`: the exponent of that without the shift
  TAB_DEVICE void query_features(Part<E, true>& b, const float* c, const float* lse,
                                 const Tokens& tokens, int bh, int m0, bool bare) const {
    const float s = scale();
    float log_den[Part<E, true>::ROWS];
    TAB_UNROLL
    for (int r = 0; r < Part<E, true>::ROWS; ++r) {
      const int i = b.row(r);
      log_den[r] = tokens(i) ? lse[static_cast<int64_t>(bh) * n + i] : INFINITY;
    }
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int j = m0 + b.column(e);
      const float shift = j < m ? c[static_cast<int64_t>(bh) * m + j] : -INFINITY;
      const float up = b.x[e] * s, l = log_den[b.which(e)];
      const float phi = relu ? rectified(up) * expf(-l) : bare ? up - l : expf(up + shift - l);
      b.x[e] = j < m ? phi : bare ? -INFINITY : 0.0f;
    }
  }

  /// dφ/d(exponent) at φ: for the exponential φ itself, for relu 1 or, of a query, 1/denominator
  TAB_DEVICE float slope(float phi, const float* log_den, int i) const {
    if (!relu) return phi;
    return !(phi > 0) ? phi * 0.0f : log_den == nullptr ? 1.0f : expf(-log_den[i]);
  }
  /// part ∘ slope
  template <bool RIGHT_T>
  TAB_DEVICE void slopes(Part<E, RIGHT_T>& part, const E* phi, const float* log_den) const {
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int i = part.row(part.which(e));
      part.x[e] *= slope(wide(phi[i * LINE<E> + part.column(e)]), log_den, i);
    }
  }
};

/// to[i] = factor·x_i·y_i for i of `tokens`, else zero, i < 64; to be read after a barrier.
template <typename T>
TAB_DEVICE void dots(float* to, const T* x, int64_t x_stride, const T* y, int64_t y_stride,
                     const Tokens& tokens, int d, float factor) {
  for (int r = 0; r < 16; ++r) {
    const int i = warp() * 16 + r;
    float sum = 0;
    for (int c = lane(); c < d && tokens(i); c += WARP)
      sum += wide(x[i * x_stride + c]) * wide(y[i * y_stride + c]);
    TAB_UNROLL
    for (int m = 1; m < WARP; m *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, m);
    if (lane() == 0) to[i] = factor * sum;
  }
}

/// o = out/(den + ε); lse, where it is wanted, = top + log(den + ε)
template <typename T, typename P>
TAB_DEVICE void finish(const P& out, const float (&top)[P::ROWS], float (&den)[P::ROWS], float eps,
                       float* lse, T* o, int64_t stride, int n, int width) {
  float inverse[P::ROWS];
  add_lanes<P>(den);
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    const float total = den[r] + eps;
    inverse[r] = total == 0 ? 0.0f : 1 / total;
    if (lse != nullptr && lane() % P::LANES == 0 && out.row(r) < n)
      lse[out.row(r)] = total == 0 ? INFINITY : finite(top[r]) + logf(total);
  }
  write(out, o, stride, n, width, inverse);
}

}  // namespace tab::few
