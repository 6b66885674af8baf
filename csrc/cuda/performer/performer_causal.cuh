// FAVOR+ of one (batch, head) with N ≤ 64 tokens, all on chip: causal, or from an initial state.
//
//   o_i = (Σ_j P_ij v_j + φ(q_i)S₀) / (Σ_j P_ij + φ(q_i)z₀ + ε),  P_ij = Σ_m e^(b_im + a_jm − r_i),
//   φ(q_i) = e^(b_i + c₀ − r_i),  c_i = max(c₀, a_j of each j that i sees),  r_i = max_m(b_im + c_im);
//   S = e^(c₀ − c)S₀ + φ(k)ᵀv with c of the last token, z likewise
//   (symbols: performer_bidirectional.cuh)
//
// The quadratic order needs no state within the tokens. P is a product of features at the shift c,
// e^(b + c − r) and e^(a − c), as long as c exceeds what any query may know by at most FAR: e^FAR is
// within float's range. Else, for extreme or masked keys, the exponentials of each pair of tokens
// are added up, 32 times as many. So tiles are float for every type, and products are FMA.
//
// Predicted at B 512 H 8 N 64 D 64 M 256 (60 TFLOP/s FMA, 16 exp a cycle and multiprocessor): forward
// 0.6 ms for 34 GFLOP, 1.2 ms when far; backward 1 ms, 3.5 ms when far.
#pragma once

#include "performer.cuh"

namespace tab::few {

constexpr float FAR = 60;

/// S (B, H, M, Dv), z (B, H, M) and c (B, H, M), or null
struct State {
  const float *s, *z, *c;
  /// The shift of `feature`, counted over batch and heads
  TAB_DEVICE float shift(int64_t feature, int relu) const {
    return s != nullptr ? c[feature] : relu ? 0.0f : -INFINITY;
  }
};

struct Exponential {
  TAB_DEVICE float operator()(float b, float a, int) const { return expf(b + a); }
};

template <typename T>
struct PerformerCausalForward {
  Performer<T, float> in;
  int causal;
  float eps;
  State from;
  Heads<T> o;
  float *s, *z, *c, *lse;  // (B, H, M, Dv), (B, H, M) twice, (B, H, N)

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  static constexpr int64_t BYTES = (5 * TILE<float> + 3 * SIDE) * sizeof(float);
  using Pairs = Part<float, true>;
  using Out = Part<float, false>;

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const norms = reinterpret_cast<float*>(memory);
    float *const tops = norms + SIDE, *const starts = tops + SIDE;  // c, c₀
    float* const x = starts + SIDE;
    float *const w = x + TILE<float>, *const keys = w + TILE<float>;
    float *const queries = keys + TILE<float>, *const v = queries + TILE<float>;
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.n, m = in.m;
    const T* const ks = in.k.at(bh, heads);
    dots(norms, ks, in.k.n, ks, in.k.n, n, in.d, in.scale() * in.scale() / 2);
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      if (c0 > 0) __syncthreads();
      load<2>(v, in.v.at(bh, heads) + c0, in.v.n, in.real(bh), width);
      Pairs p;
      Out out;
      float top[Out::ROWS], den[Out::ROWS];
      TAB_UNROLL
      for (int r = 0; r < Out::ROWS; ++r) top[r] = in.relu ? 0.0f : -INFINITY, den[r] = 0;
      for (int m0 = 0; m0 < m; m0 += SIDE) {
        const int count = columns(m, m0);
        const int64_t features = static_cast<int64_t>(bh) * m + m0;
        Pairs a, b;
        in.project(a, ks, in.k.n, in.real(bh), x, w, w, m0, true, false);
        in.exponents(a, norms, bh);
        keep(a, keys);
        in.project(b, in.q.at(bh, heads), in.q.n, n, x, w, w, m0, true, true);
        __syncthreads();
        if (from.s) load<2>(w, from.s + features * in.dv + c0, in.dv, count, width);
        const bool far = shifts(x, keys, tops, starts, features, count);
        advance(p, out, b, x, top, den, count);
        TAB_UNROLL
        for (int e = 0; e < 32; ++e) {
          const float shift = tops[a.column(e)];
          a.x[e] = in.relu ? rectified(a.x[e]) : expf(a.x[e] - finite(shift));
          const float up = b.x[e] - finite(top[b.which(e)]);
          b.x[e] = in.relu ? rectified(b.x[e]) : far ? up : expf(up + shift);
        }
        keep(a, x);  // each element in place of the shift that this thread has read there
        keep(b, queries);
        __syncthreads();
        if (far)
          multiply<false>(p, queries, keys, n, count, Exponential{});
        else
          multiply<false>(p, queries, x, n, count);
        write_state(x, v, w, tops, starts, features, count, c0, width);
        if (from.s == nullptr) continue;
        TAB_UNROLL
        for (int e = 0; e < 32; ++e) {  // φ(q) at the shift c₀
          const int j = b.column(e);
          if (!in.relu)
            b.x[e] = far ? expf(b.x[e] + starts[j]) : b.x[e] * expf(starts[j] - finite(tops[j]));
          if (j < count) den[b.which(e)] += b.x[e] * from.z[features + j];
        }
        __syncwarp();  // a warp reads and writes its own rows only
        keep(b, queries);
        __syncwarp();
        multiply<false>(out, queries, w, n, count);
      }
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        if (causal && p.column(e) > p.row(p.which(e))) p.x[e] = 0;
        den[p.which(e)] += p.x[e];
      }
      __syncwarp();
      keep(p, queries);
      __syncwarp();
      multiply<false>(out, queries, v, n, n);
      finish(out, top, den, eps, c0 == 0 ? lse + static_cast<int64_t>(bh) * n : nullptr,
             o.at(bh, heads) + c0, o.n, n, width);
    }
  }

  /// x(i, j) = c_ij, what query i may know; tops and starts: c and c₀. Whether a query is far.
  TAB_DEVICE bool shifts(float* x, const float* keys, float* tops, float* starts, int64_t features,
                         int count) const {
    const int j = static_cast<int>(threadIdx.x);
    bool far = false;
    if (j < SIDE) {
      float top = starts[j] = j < count ? from.shift(features + j, in.relu) : -INFINITY;
      for (int i = 0; i < in.n && !in.relu; ++i)
        x[i * LINE<float> + j] = top = fmaxf(top, keys[i * LINE<float> + j]);
      for (int i = 0; i < in.n && !causal; ++i) x[i * LINE<float> + j] = top;
      far = !in.relu && top - x[j] > FAR;  // of the first query: later ones know more
      tops[j] = top;
    }
    return __syncthreads_or(far);
  }

  /// b, as projected -> exponents; top -> r with these features, and what was summed is rescaled.
  TAB_DEVICE void advance(Pairs& p, Out& out, Pairs& b, const float* x, float (&top)[Pairs::ROWS],
                          float (&den)[Pairs::ROWS], int count) const {
    const float scale = in.scale();
    float before[Pairs::ROWS];
    TAB_UNROLL
    for (int r = 0; r < Pairs::ROWS; ++r) before[r] = top[r];
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int i = b.row(b.which(e)), j = b.column(e);
      b.x[e] = j < count ? b.x[e] * scale : -INFINITY;
      if (!in.relu) top[b.which(e)] = fmaxf(top[b.which(e)], b.x[e] + x[i * LINE<float> + j]);
    }
    top_lanes<Pairs>(top);
    TAB_UNROLL
    for (int r = 0; r < Pairs::ROWS; ++r) {
      const float factor = in.relu ? 1.0f : expf(before[r] - finite(top[r]));
      den[r] *= factor;
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        if (out.which(e) == r) out.x[e] *= factor;
        if (p.which(e) == r) p.x[e] *= factor;
      }
    }
  }

  /// S and z of these features, S₀ in w, and c
  TAB_DEVICE void write_state(const float* phi, const float* v, const float* w, const float* tops,
                              const float* starts, int64_t features, int count, int c0,
                              int width) const {
    const auto factor = [&](int j) { return in.relu ? 1.0f : expf(starts[j] - finite(tops[j])); };
    Out state;  // (features, columns of v)
    if (from.s) {
      take(state, w);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) state.x[e] *= factor(state.row(state.which(e)));
    }
    multiply<true>(state, phi, v, count, in.n);
    write(state, s + features * in.dv + c0, in.dv, count, width);
    const int j = static_cast<int>(threadIdx.x);
    if (j >= count || c0 > 0) return;
    float sum = from.s ? factor(j) * from.z[features + j] : 0.0f;
    for (int i = 0; i < in.n; ++i) sum += phi[i * LINE<float> + j];
    z[features + j] = sum, c[features + j] = tops[j];
  }
};

}  // namespace tab::few
