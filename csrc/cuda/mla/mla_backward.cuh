// Latent attention of one (batch, head) with N ≤ 64 tokens, backward (mla.cuh).
//
//   dK = scale·dSᵀQ_n, dV = PᵀdO, dQ_n = scale·dS K, dQ_r = scale·dS K_r, dK_r = scale·Σ_h dSᵀQ_r
//
// dK and dV of each head are written: dC and the weights' gradients sum over heads and over the
// batch, which are two large matrix products for cuBLAS (mla.cu), in a fixed order without atomics.
#pragma once

#include "../softmax/softmax_backward.cuh"
#include "mla.cuh"

namespace tab::few {

template <typename T>
struct MlaBackward {
  Latents<T> in;
  Heads<const T> dout;
  const float *lse, *dlse;         // (B, H, N); dlse may be null
  Heads<T> dqn, dqr, dk, dv, dkr;  // dK_r of each head

  static constexpr int THREADS = few::THREADS, BLOCKS = 2;
  static constexpr int64_t BYTES = 6 * TILE<T> * sizeof(T) + SIDE * sizeof(uint64_t) + SIDE;

  TAB_DEVICE void operator()(unsigned char* memory) const {
    auto* const seen = reinterpret_cast<uint64_t*>(memory);
    auto* const room = reinterpret_cast<uint8_t*>(seen + SIDE);
    T* const x = reinterpret_cast<T*>(room + SIDE);
    T *const y = x + TILE<T>, *const k = y + TILE<T>, *const q = k + TILE<T>;
    T *const u = q + TILE<T>, *const w = u + TILE<T>;
    const int bh = static_cast<int>(blockIdx.x), heads = in.heads, n = in.sees.n;
    const T *const qn = in.qn.at(bh, heads), *const qr = in.qr.at(bh, heads);
    const T *const kr = in.kr.at(bh, heads), *const gs = dout.at(bh, heads);
    const int64_t row = static_cast<int64_t>(bh) * n;
    const float* const dl = dlse == nullptr ? nullptr : dlse + row;
    const Tokens queries = heard(room, in.real(bh), gs, dout.n, in.dv, dl);
    in.sees.all(seen, bh / heads, bh % heads);
    Part<T, true> p, ds;
    for (int d = 0; d < in.dn; d += SIDE) {
      in.expand(k, x, y, bh, in.uk, in.dn, d, d == 0);
      load(q, qn + d, in.qn.n, queries, columns(in.dn, d));
      __syncthreads();
      multiply<false>(p, q, k, n, columns(in.dn, d));
    }
    for (int d = 0; d < in.dr; d += SIDE) {
      if (d > 0) __syncthreads();
      load(u, qr + d, in.qr.n, queries, columns(in.dr, d));
      load(w, kr + d, in.kr.n, in.real(bh), columns(in.dr, d));
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
    softmax_backward(p, ds, lse + row, dl, queries);
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
        load(q, qn + d, in.qn.n, queries, columns(in.dn, d));
        __syncthreads();
      }
      gradients(w, q, k, dqn, dk, bh, d, in.dn);
    }
    for (int d = 0; d < in.dr; d += SIDE) {
      __syncthreads();
      load(q, qr + d, in.qr.n, queries, columns(in.dr, d));
      load(k, kr + d, in.kr.n, in.real(bh), columns(in.dr, d));
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
