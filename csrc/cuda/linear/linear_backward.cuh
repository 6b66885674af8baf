// Linear attention of one (batch, head) with N ≤ 64 tokens, backward (linear.cuh).
//
//   with g = do/den, δ = g·o, G = g vᵀ − δ where i sees j, else 0:
//   dφ(q) = G φ(k) + g S₀ᵀ − δ z₀,  dφ(k) = Gᵀφ(q) + v dSᵀ + dz,  dv = Pᵀg + φ(k) dS,
//   dS₀ = dS + φ(q)ᵀg,  dz₀ = dz − φ(q)ᵀδ
#pragma once

#include "linear.cuh"

namespace tab::few {

template <typename T>
struct LinearBackward {
  Linear<T> in;
  Heads<const T> dout, o;
  const float *ds, *dz;  // or null
  Heads<T> dq, dk, dv;
  float *ds0, *dz0;

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  static constexpr int64_t BYTES = (6 * TILE<float> + 2 * SIDE) * sizeof(float) + SIDE;
  using Pairs = Part<float, true>;
  using Out = Part<float, false>;

  struct Tiles {
    float *inverse, *delta, *queries, *keys, *pairs, *g, *x, *y;
    Tokens heard{0};
    TAB_DEVICE explicit Tiles(float* memory) {
      inverse = memory, delta = inverse + SIDE, queries = delta + SIDE;
      keys = queries + TILE<float>, pairs = keys + TILE<float>, g = pairs + TILE<float>;
      x = g + TILE<float>, y = x + TILE<float>;
    }
  };

  TAB_DEVICE void operator()(unsigned char* memory) const {
    Tiles t(reinterpret_cast<float*>(memory));
    const int bh = static_cast<int>(blockIdx.x), n = in.n;
    t.heard = heard(reinterpret_cast<uint8_t*>(t.y + TILE<float>), in.real(bh),
                    dout.at(bh, in.heads), dout.n, in.dv);
    Pairs p;
    denominators(t, p, bh);
    {
      Pairs g;
      times(g, t, true, in.v.at(bh, in.heads), in.v.n, in.real(bh), bh);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int i = g.row(g.which(e));
        g.x[e] = in.sees(i, g.column(e)) ? g.x[e] - t.delta[i] : 0.0f;
      }
      keep(g, t.pairs);
    }
    for (int d0 = 0; d0 < in.d; d0 += SIDE) {
      __syncthreads();
      if (in.d > SIDE) {
        in.load_q(t.queries, t.heard, bh, d0);
        in.load_k(t.keys, bh, d0);
        __syncthreads();
      }
      features(t, bh, d0);
    }
    __syncthreads();
    keep(p, t.pairs);
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      if (c0 > 0) __syncthreads();
      load_g(t, bh, c0);
      __syncthreads();
      Out out;
      multiply<true>(out, t.pairs, t.g, n, n);
      for (int d0 = 0; ds != nullptr && d0 < in.d; d0 += SIDE) {
        const int64_t row = static_cast<int64_t>(bh) * in.d + d0;
        __syncthreads();
        if (in.d > SIDE) in.load_k(t.keys, bh, d0);
        load<2>(t.y, ds + row * in.dv + c0, in.dv, columns(in.d, d0), width);
        __syncthreads();
        multiply<false>(out, t.keys, t.y, n, columns(in.d, d0));
      }
      write(out, dv.at(bh, in.heads) + c0, dv.n, n, width);
    }
  }

  /// p = P; inverse and delta of each token, to be read after the next barrier (of `times`)
  TAB_DEVICE void denominators(const Tiles& t, Pairs& p, int bh) const {
    float den[Pairs::ROWS] = {}, inverse[Pairs::ROWS];
    for (int d0 = 0; d0 < in.d; d0 += SIDE) {
      if (d0 > 0) __syncthreads();
      in.pairs(p, den, t.queries, t.keys, t.heard, bh, d0);
    }
    in.divide(p, den, inverse);
    TAB_UNROLL
    for (int r = 0; r < Pairs::ROWS; ++r)
      if (lane() % Pairs::LANES == 0) t.inverse[p.row(r)] = inverse[r];
    __syncwarp();
    const T *const gs = dout.at(bh, in.heads), *const os = o.at(bh, in.heads);
    for (int r = 0; r < 16; ++r) {
      const int i = warp() * 16 + r;
      float sum = 0;
      for (int c = lane(); c < in.dv && t.heard(i); c += WARP)
        sum += wide(gs[i * dout.n + c]) * wide(os[i * o.n + c]);
      TAB_UNROLL
      for (int m = 1; m < WARP; m *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, m);
      if (lane() == 0) t.delta[i] = sum * t.inverse[i];
    }
  }

  TAB_DEVICE void load_g(const Tiles& t, int bh, int c) const {
    const float* const inverse = t.inverse;
    load<2>(t.g, dout.at(bh, in.heads) + c, dout.n, in.n, columns(in.dv, c),
            [inverse](float x, int i, int) { return x * inverse[i]; });
  }

  /// part += X Yᵀ over the columns of v: X is g (`of_g`) or v, Y has the rows `of_y`.
  template <typename Y>
  TAB_DEVICE void times(Pairs& part, const Tiles& t, bool of_g, const Y* y, int64_t stride,
                        const Tokens& of_y, int bh) const {
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      __syncthreads();
      if (of_g)
        load_g(t, bh, c0);
      else
        load<2>(t.x, in.v.at(bh, in.heads) + c0, in.v.n, in.real(bh), width);
      load<2>(t.y, y + c0, stride, of_y, width);
      __syncthreads();
      multiply<false>(part, of_g ? t.g : t.x, t.y, in.n, width);
    }
  }

  /// Columns d0 and after of dq and dk, rows d0 and after of dS₀ and dz₀
  TAB_DEVICE void features(const Tiles& t, int bh, int d0) const {
    const int n = in.n, count = columns(in.d, d0), map = in.feature_map;
    const int64_t row = static_cast<int64_t>(bh) * in.d + d0;
    initial(t, bh, row, d0);
    {
      Out part;
      if (in.s0) {  // g S₀ᵀ − δ z₀
        Pairs u;
        times(u, t, true, in.s0 + row * in.dv, in.dv, count, bh);
        TAB_UNROLL
        for (int e = 0; e < 32; ++e)
          if (u.column(e) < count && u.row(u.which(e)) < n)
            u.x[e] -= t.delta[u.row(u.which(e))] * in.z0[row + u.column(e)];
        regroup(part, u, t.x);
      }
      multiply<false>(part, t.pairs, t.keys, n, n);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e)
        part.x[e] *= slope(t.queries[part.row(part.which(e)) * LINE<float> + part.column(e)], map);
      write(part, dq.at(bh, in.heads) + d0, dq.n, n, count);
    }
    Out part;
    if (ds) {  // v dSᵀ + dz
      Pairs u;
      times(u, t, false, ds + row * in.dv, in.dv, count, bh);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e)
        if (u.column(e) < count) u.x[e] += dz[row + u.column(e)];
      regroup(part, u, t.x);
    }
    multiply<true>(part, t.pairs, t.queries, n, n);
    const Tokens real = in.real(bh);
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int i = part.row(part.which(e));
      const float f = t.keys[i * LINE<float> + part.column(e)];
      part.x[e] = real(i) ? part.x[e] * slope(f, map) : 0.0f;
    }
    write(part, dk.at(bh, in.heads) + d0, dk.n, n, count);
  }

  TAB_DEVICE void initial(const Tiles& t, int bh, int64_t row, int d0) const {
    const int count = columns(in.d, d0), j = static_cast<int>(threadIdx.x);
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      if (c0 > 0) __syncthreads();
      if (in.dv > SIDE) {
        load_g(t, bh, c0);
        __syncthreads();
      }
      Out part;
      multiply<true>(part, t.queries, t.g, count, in.n);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int i = part.row(part.which(e)), c = c0 + part.column(e);
        if (ds && i < count && c < in.dv) part.x[e] += ds[(row + i) * in.dv + c];
      }
      write(part, ds0 + row * in.dv + c0, in.dv, count, columns(in.dv, c0));
    }
    if (j >= count) return;
    float sum = dz ? dz[row + j] : 0.0f;
    for (int i = 0; i < in.n; ++i) sum -= t.queries[i * LINE<float> + j] * t.delta[i];
    dz0[row + j] = sum;
  }
};

}  // namespace tab::few
