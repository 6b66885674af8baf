// FAVOR+ of one (batch, head) with N ≤ 64 tokens, backward: causal, or with states. Forward:
// performer_causal.cuh.
//
//   with φ(q) and P divided by the denominator, E_ijm the terms of P_ij, δ = do·o, G = do vᵀ − δ
//   where i sees j, else 0; from shift c₀: φ(q), S₀, z₀; from c: φ(k), dS, dz:
//   db = Σ_j G_ij E_ij + φ(q)∘(do S₀ᵀ − δ z₀),  da = Σ_i G_ij E_ij + φ(k)∘(v dSᵀ + dz),
//   dv = Pᵀdo + φ(k) dS,  dS₀ = e^(c₀ − c)dS + φ(q)ᵀdo,  dz₀ = e^(c₀ − c)dz − φ(q)ᵀδ
#pragma once

#include "performer_causal_terms.cuh"

namespace tab::few {

template <typename T>
struct PerformerCausalBackward : PerformerCausalTerms<T> {
  Heads<T> dq, dk, dv;
  float *ds0, *dz0;  // null without `from`

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  using Terms = PerformerCausalTerms<T>;
  using Terms::in, Terms::causal, Terms::from, Terms::grad, Terms::dout, Terms::o, Terms::lse;
  using Terms::sees, Terms::times, Terms::features, Terms::factor;
  using typename Terms::Pairs, typename Terms::Tiles;
  using Out = Part<float, false>;

  struct Gradients {
    Out to_q, to_k;
    float total[Out::ROWS];
  };

  TAB_DEVICE void operator()(unsigned char* memory) const {
    Tiles t(reinterpret_cast<float*>(memory));
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.n;
    const T *const ks = in.k.at(bh, heads), *const gs = dout.at(bh, heads);
    const float scale = in.scale();
    dots(t.norms, ks, in.k.n, ks, in.k.n, n, in.d, scale * scale / 2);
    t.heard =
        heard(reinterpret_cast<uint8_t*>(t.sum + TILE<float>), in.real(bh), gs, dout.n, in.dv);
    dots(t.delta, gs, dout.n, o.at(bh, heads), o.n, t.heard, in.dv, 1.0f);
    make_pairs(t, bh);
    Gradients g;
    for (int d0 = 0; d0 < in.d; d0 += SIDE) {
      const int width = columns(in.d, d0);
      g.to_q = {}, g.to_k = {};
      TAB_UNROLL
      for (int r = 0; r < Out::ROWS; ++r) g.total[r] = 0;
      for (int m0 = 0; m0 < in.m; m0 += SIDE)
        features(t, bh, m0) ? pass<false>(t, g, bh, m0, d0) : pass<true>(t, g, bh, m0, d0);
      add_lanes<Out>(g.total);
      write(g.to_q, dq.at(bh, heads) + d0, dq.n, n, width, scale);
      load<2>(t.x, ks + d0, in.k.n, in.real(bh), width);
      __syncthreads();
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        const int r = g.to_k.which(e), at = g.to_k.row(r) * LINE<float> + g.to_k.column(e);
        if (!in.relu) g.to_k.x[e] -= g.total[r] * scale * t.x[at];
      }
      write(g.to_k, dk.at(bh, heads) + d0, dk.n, n, width, scale);
    }
    values(t, bh);
  }

  /// pairs = G
  TAB_DEVICE void make_pairs(const Tiles& t, int bh) const {
    Pairs g;
    times(g, t, dout.at(bh, in.heads), dout.n, in.n, in.v.at(bh, in.heads), in.v.n, in.real(bh));
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int i = g.row(g.which(e));
      g.x[e] = sees(i, g.column(e)) ? g.x[e] - t.delta[i] : 0.0f;
    }
    keep(g, t.pairs);
  }

  template <bool NEAR>
  TAB_DEVICE void pass(const Tiles& t, Gradients& g, int bh, int m0, int d0) const {
    const int n = in.n, count = columns(in.m, m0), width = columns(in.d, d0);
    const float* const log_den = lse + static_cast<int64_t>(bh) * n;
    const float* const ws = in.w + static_cast<int64_t>(m0) * in.d + d0;
    const int64_t all = static_cast<int64_t>(bh) * in.m + m0;
    if (from.s) this->template from_initial<NEAR>(t, all, count, bh);
    Out part;
    const auto far = [&part](const float* own) {  // exponents; read again, registers are too few
      return [own, &part](float pair, float other, int e) {  // 0 · ∞ where one does not see
        const float b = own[part.row(part.which(e)) * LINE<float> + part.column(e)];
        return pair == 0 ? 0.0f : pair * expf(b + other);
      };
    };
    if constexpr (NEAR) {
      multiply<false>(part, t.pairs, t.x, n, n);
      in.slopes(part, t.queries, log_den);
    } else {
      multiply<false>(part, t.pairs, t.keys, n, n, far(t.queries));
    }
    if (from.s) add(part, t.sum);
    project_back(g.to_q, t, part, ws, count, width);

    if (grad.s) this->from_final(t, all, count, bh);
    part = {};
    if constexpr (NEAR) {
      multiply<true>(part, t.pairs, t.queries, n, n);
      in.slopes(part, t.x, nullptr);
    } else {
      multiply<true>(part, t.pairs, t.queries, n, n, far(t.keys));
    }
    if (grad.s) add(part, t.sum);
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) g.total[part.which(e)] += part.x[e];
    project_back(g.to_k, t, part, ws, count, width);
  }

  /// to += part W, whose columns `width` begin at ws
  TAB_DEVICE void project_back(Out& to, const Tiles& t, const Out& part, const float* ws, int count,
                               int width) const {
    __syncthreads();
    keep(part, t.sum);
    load<2>(t.w, ws, in.d, count, width);
    __syncthreads();
    multiply<false>(to, t.sum, t.w, in.n, count);
  }

  /// dS₀ and dz₀ of these features
  template <bool NEAR>
  TAB_DEVICE void to_initial(const Tiles& t, int64_t all, int count, int bh) const {
    const int j = static_cast<int>(threadIdx.x);
    if (j < count) {
      float sum = grad.z ? factor(t, j) * grad.z[all + j] : 0.0f;
      for (int i = 0; i < in.n; ++i)
        sum -= this->template start_feature<NEAR>(t, i, j) * t.delta[i];
      dz0[all + j] = sum;
    }
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      __syncthreads();
      load<2>(t.sum, dout.at(bh, in.heads) + c0, dout.n, in.n, width);
      if (grad.s) load<2>(t.w, grad.s + all * in.dv + c0, in.dv, count, width);
      __syncthreads();
      Out ds, given;
      float start[Out::ROWS];
      TAB_UNROLL
      for (int r = 0; r < Out::ROWS; ++r) start[r] = t.starts[ds.row(r)];
      if constexpr (NEAR)
        multiply<true>(ds, t.queries, t.sum, count, in.n);
      else
        multiply<true>(ds, t.queries, t.sum, count, in.n,
                       [&](float b, float x, int e) { return expf(b + start[e / 8]) * x; });
      if (grad.s) take(given, t.w);
      TAB_UNROLL
      for (int e = 0; e < 32; ++e) {
        const float f = factor(t, ds.row(ds.which(e)));
        ds.x[e] = NEAR ? (ds.x[e] + given.x[e]) * f : ds.x[e] + given.x[e] * f;
      }
      write(ds, ds0 + all * in.dv + c0, in.dv, count, width);
    }
  }

  /// to += the tile, written in another arrangement
  TAB_DEVICE void add(Out& to, const float* tile) const {
    Out other;
    __syncwarp();
    take(other, tile);
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) to.x[e] += other.x[e];
  }

  /// dS₀, dz₀ and dv = Pᵀdo + φ(k) dS, apart: beside the sums of dq and dk, registers are too few.
  TAB_DEVICE void values(const Tiles& t, int bh) const {
    Pairs p;
    for (int m0 = 0; m0 < in.m; m0 += SIDE) {
      const int count = columns(in.m, m0);
      const int64_t all = static_cast<int64_t>(bh) * in.m + m0;
      if (features(t, bh, m0)) {
        multiply<false>(p, t.queries, t.keys, in.n, count, Exponential{});
        if (from.s) to_initial<false>(t, all, count, bh);
      } else {
        multiply<false>(p, t.queries, t.x, in.n, count);
        if (from.s) to_initial<true>(t, all, count, bh);
      }
    }
    TAB_UNROLL
    for (int e = 0; e < 32; ++e)
      if (!sees(p.row(p.which(e)), p.column(e))) p.x[e] = 0;
    keep(p, t.pairs);
    for (int c0 = 0; c0 < in.dv; c0 += SIDE) {
      const int width = columns(in.dv, c0);
      __syncthreads();
      load<2>(t.sum, dout.at(bh, in.heads) + c0, dout.n, in.n, width);
      __syncthreads();
      Out out;
      multiply<true>(out, t.pairs, t.sum, in.n, in.n);
      for (int m0 = 0; grad.s && m0 < in.m; m0 += SIDE) {
        Pairs a;
        in.project(a, in.k.at(bh, in.heads), in.k.n, in.real(bh), t.x, t.w, t.w, m0, true, false);
        in.exponents(a, t.norms, bh);
        in.key_features(a, grad.c, bh, m0);
        keep(a, t.queries);
        const int64_t all = static_cast<int64_t>(bh) * in.m + m0;
        load<2>(t.sum, grad.s + all * in.dv + c0, in.dv, columns(in.m, m0), width);
        __syncthreads();
        multiply<false>(out, t.queries, t.sum, in.n, columns(in.m, m0));
      }
      write(out, dv.at(bh, in.heads) + c0, dv.n, in.n, width);
    }
  }
};

}  // namespace tab::few
