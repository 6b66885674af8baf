// Latent attention of one (batch, head) with N ≤ 64 tokens, all on chip.
//
//   K = C W_ukᵀ, V = C W_uvᵀ, S = scale·(Q_n Kᵀ + Q_r K_rᵀ), O = softmax(S) V    (tab/ops/mla.py)
//   dK = scale·dSᵀQ_n, dV = PᵀdO, dQ_n = scale·dS K, dQ_r = scale·dS K_r, dK_r = scale·Σ_h dSᵀQ_r
//
// K and V are made tile by tile from the latents and never written; softmax: softmax_small.cuh.
// Backward writes dK and dV of each head: dC and the weights' gradients sum over heads and over the
// batch, which are two large matrix products for cuBLAS (mla.cu), in a fixed order without atomics.
//
// Floors at B 512 H 8 N 64, Dn 48, Dr 16, R = Dv = 64 (4.3 TB/s; 60 TFLOP/s FMA), predicted:
// forward float32 35 µs for Q, O and the latents, 125 µs for 7.5 GFLOP; the half types' FLOPs run on
// tensor cores in a tenth of that, and 18 µs of memory count.
#pragma once

#include "../softmax/softmax_small.cuh"

namespace tab::few {

/// What both directions read. C and K_r are shared by the heads: their h is 0.
template <typename T>
struct Latents {
  int heads, dn, dr, r, dv;
  float scale;
  Sees sees;
  Heads<const T> qn, qr, c, kr;
  const T *uk, *uv;  // (H, Dn, R), (H, Dv, R)

  /// to = C Wᵀ for the rows `from` and after of this head's `weights` (size, R). All threads have
  /// left `to` and y before; x holds C from the first call on if that is one tile.
  TAB_DEVICE void expand(T* to, T* x, T* y, int bh, const T* weights, int size, int from,
                         bool first) const {
    const T* const cs = c.at(bh, heads);
    const T* const ws = weights + (static_cast<int64_t>(bh % heads) * size + from) * r;
    Part<T, true> part;
    for (int s = 0; s < r; s += SIDE) {
      __syncthreads();
      if (first || r > SIDE) load(x, cs + s, c.n, sees.n, columns(r, s));
      load(y, ws + s, r, columns(size, from), columns(r, s));
      __syncthreads();
      multiply<false>(part, x, y, sees.n, columns(r, s));
    }
    keep(part, to);
  }
};

template <typename T>
struct MlaForward {
  Latents<T> in;
  Heads<T> o;
  float *lse, *peak;  // (B, H, N), (B, H)

  static constexpr int THREADS = few::THREADS, BLOCKS = 3;
  static constexpr int64_t BYTES = 4 * TILE<T> * sizeof(T) + SIDE * sizeof(uint64_t) + 4 * 4;

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const seen = reinterpret_cast<uint64_t*>(memory);
    T* const x = reinterpret_cast<T*>(seen + SIDE);
    T *const y = x + TILE<T>, *const k = y + TILE<T>, *const q = k + TILE<T>;
    auto* const tops = reinterpret_cast<float*>(q + TILE<T>);
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.sees.n;
    in.sees.all(seen, bh / heads, bh % heads);
    Part<T, true> s;
    for (int d = 0; d < in.dn; d += SIDE) {
      in.expand(k, x, y, bh, in.uk, in.dn, d, d == 0);
      load(q, in.qn.at(bh, heads) + d, in.qn.n, n, columns(in.dn, d));
      __syncthreads();
      multiply<false>(s, q, k, n, columns(in.dn, d));
    }
    for (int d = 0; d < in.dr; d += SIDE) {
      __syncthreads();
      load(q, in.qr.at(bh, heads) + d, in.qr.n, n, columns(in.dr, d));
      load(k, in.kr.at(bh, heads) + d, in.kr.n, n, columns(in.dr, d));
      __syncthreads();
      multiply<false>(s, q, k, n, columns(in.dr, d));
    }
    mask(s, seen, in.scale);
    write_peak(s, tops, bh);
    float inverse[Part<T, true>::ROWS];
    softmax(s, lse + static_cast<int64_t>(bh) * n, n, inverse);
    keep(s, q);  // a warp overwrites its own rows only; expand has a barrier
    for (int d = 0; d < in.dv; d += SIDE) {
      in.expand(k, x, y, bh, in.uv, in.dv, d, false);
      __syncthreads();
      Part<T, false> out;
      multiply<false>(out, q, k, n, n);
      write(out, o.at(bh, heads) + d, o.n, n, columns(in.dv, d), inverse);
    }
  }

  /// The largest score of a token that is real: masked tokens count neither as keys nor as queries.
  TAB_DEVICE void write_peak(const Part<T, true>& s, float* tops, int bh) const {
    const uint8_t* const real = in.sees.mask;
    const int64_t first = static_cast<int64_t>(bh / in.heads) * in.sees.n;
    float top = -INFINITY;
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int i = s.row(s.which(e));
      if (i < in.sees.n && (real == nullptr || real[first + i] != 0)) top = fmaxf(top, s.x[e]);
    }
    TAB_UNROLL
    for (int m = 1; m < WARP; m *= 2) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, m));
    if (lane() == 0) tops[warp()] = top;
    __syncthreads();
    if (threadIdx.x == 0) peak[bh] = fmaxf(fmaxf(tops[0], tops[1]), fmaxf(tops[2], tops[3]));
  }
};

template <typename T>
struct MlaBackward {
  Latents<T> in;
  Heads<const T> dout;
  const float *lse, *dlse;  // (B, H, N); dlse may be null
  Heads<T> dqn, dqr, dk, dv, dkr;  // dK_r of each head

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  static constexpr int64_t BYTES = 6 * TILE<T> * sizeof(T) + SIDE * sizeof(uint64_t);

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const seen = reinterpret_cast<uint64_t*>(memory);
    T* const x = reinterpret_cast<T*>(seen + SIDE);
    T *const y = x + TILE<T>, *const k = y + TILE<T>, *const q = k + TILE<T>;
    T *const u = q + TILE<T>, *const w = u + TILE<T>;
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.sees.n;
    const T *const qn = in.qn.at(bh, heads), *const qr = in.qr.at(bh, heads);
    const T *const kr = in.kr.at(bh, heads), *const gs = dout.at(bh, heads);
    in.sees.all(seen, bh / heads, bh % heads);
    Part<T, true> p, ds;
    for (int d = 0; d < in.dn; d += SIDE) {
      in.expand(k, x, y, bh, in.uk, in.dn, d, d == 0);
      load(q, qn + d, in.qn.n, n, columns(in.dn, d));
      __syncthreads();
      multiply<false>(p, q, k, n, columns(in.dn, d));
    }
    for (int d = 0; d < in.dr; d += SIDE) {
      if (d > 0) __syncthreads();
      load(u, qr + d, in.qr.n, n, columns(in.dr, d));
      load(w, kr + d, in.kr.n, n, columns(in.dr, d));
      __syncthreads();
      multiply<false>(p, u, w, n, columns(in.dr, d));
    }
    for (int d = 0; d < in.dv; d += SIDE) {
      in.expand(w, x, y, bh, in.uv, in.dv, d, false);
      load(u, gs + d, dout.n, n, columns(in.dv, d));
      __syncthreads();
      multiply<false>(ds, u, w, n, columns(in.dv, d));
    }
    mask(p, seen, in.scale);
    const int64_t row = static_cast<int64_t>(bh) * n;
    softmax_backward(p, ds, lse + row, dlse == nullptr ? nullptr : dlse + row, n);
    __syncthreads();
    keep(p, w);
    __syncthreads();
    for (int d = 0; d < in.dv; d += SIDE) {
      if (in.dv > SIDE) {
        if (d > 0) __syncthreads();
        load(u, gs + d, dout.n, n, columns(in.dv, d));
        __syncthreads();
      }
      Part<T, false> out;
      multiply<true>(out, w, u, n, n);
      write(out, dv.at(bh, heads) + d, dv.n, n, columns(in.dv, d));
    }
    __syncthreads();
    keep(ds, w);
    __syncthreads();
    for (int d = 0; d < in.dn; d += SIDE) {
      if (in.dn > SIDE) {
        in.expand(k, x, y, bh, in.uk, in.dn, d, false);
        load(q, qn + d, in.qn.n, n, columns(in.dn, d));
        __syncthreads();
      }
      gradients(w, q, k, dqn, dk, bh, d, in.dn);
    }
    for (int d = 0; d < in.dr; d += SIDE) {
      __syncthreads();
      load(q, qr + d, in.qr.n, n, columns(in.dr, d));
      load(k, kr + d, in.kr.n, n, columns(in.dr, d));
      __syncthreads();
      gradients(w, q, k, dqr, dkr, bh, d, in.dr);
    }
  }

  /// Columns `from` and after of dQ = scale·dS K and dK = scale·dSᵀQ
  TAB_DEVICE void gradients(const T* ds, const T* q, const T* k, const Heads<T>& to_q,
                            const Heads<T>& to_k, int bh, int from, int size) const {
    const int n = in.sees.n, d = columns(size, from);
    Part<T, false> out_q, out_k;
    multiply<false>(out_q, ds, k, n, n);
    write(out_q, to_q.at(bh, in.heads) + from, to_q.n, n, d, in.scale);
    multiply<true>(out_k, ds, q, n, n);
    write(out_k, to_k.at(bh, in.heads) + from, to_k.n, n, d, in.scale);
  }
};

}  // namespace tab::few
