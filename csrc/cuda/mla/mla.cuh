// Latent attention of one (batch, head) with N ≤ 64 tokens, all on chip.
//
//   K = C W_ukᵀ, V = C W_uvᵀ, S = scale·(Q_n Kᵀ + Q_r K_rᵀ), O = softmax(S) V    (tab/ops/mla.py)
//
// K and V are made tile by tile from the latents and never written; softmax: softmax.cuh.
//
// Floors at B 512 H 8 N 64, Dn 48, Dr 16, R = Dv = 64 (4.3 TB/s; 60 TFLOP/s FMA), predicted:
// forward float32 35 µs for Q, O and the latents, 125 µs for 7.5 GFLOP; the half types' FLOPs run on
// tensor cores in a tenth of that, and 18 µs of memory count.
#pragma once

#include "../softmax/softmax.cuh"

namespace tab::few {

/// What both directions read. C and K_r are shared by the heads: their h is 0.
template <typename T>
struct Latents {
  int heads, dn, dr, r, dv;
  float scale;
  Sees sees;
  Heads<const T> qn, qr, c, kr;
  const T *uk, *uv;  // (H, Dn, R), (H, Dv, R)

  TAB_DEVICE Tokens real(int bh) const { return sees.real(bh / heads); }

  /// to = C Wᵀ for the rows `from` and after of this head's `weights` (size, R). All threads have
  /// left `to` and y before; x holds C from the first call on if that is one tile.
  TAB_DEVICE void expand(T* to, T* x, T* y, int bh, const T* weights, int size, int from,
                         bool first) const {
    const T* const cs = c.at(bh, heads);
    const T* const ws = weights + (static_cast<int64_t>(bh % heads) * size + from) * r;
    Part<T, true> part;
    for (int s = 0; s < r; s += SIDE) {
      __syncthreads();
      if (first || r > SIDE) load(x, cs + s, c.n, real(bh), columns(r, s));
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
      load(k, in.kr.at(bh, heads) + d, in.kr.n, in.real(bh), columns(in.dr, d));
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
  /// NaN if one is.
  TAB_DEVICE void write_peak(const Part<T, true>& s, float* tops, int bh) const {
    const Tokens real = in.real(bh);
    float top = -INFINITY;
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      if (real(s.row(s.which(e)))) top = larger(top, s.x[e]);
    }
    TAB_UNROLL
    for (int m = 1; m < WARP; m *= 2) top = larger(top, __shfl_xor_sync(ALL_LANES, top, m));
    if (lane() == 0) tops[warp()] = top;
    __syncthreads();
    if (threadIdx.x == 0) peak[bh] = larger(larger(tops[0], tops[1]), larger(tops[2], tops[3]));
  }
};

}  // namespace tab::few
