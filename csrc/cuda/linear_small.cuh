// Linear attention of one (batch, head) with few tokens, all on chip: the arithmetic of linear.cu.
//
//   o = φ(q)ᵀS / (φ(q)ᵀz + ε),  S = φ(k)ᵀv,  z = Σφ(k)                 (formula: tab/ops/linear.py)
//
// A block computes one (batch, head) in phases with a barrier between them. A phase is a function
// that every thread runs; within a phase no thread reads what another one writes.
#pragma once

#include "device.cuh"

namespace tab::few {

constexpr int MAX_SIZE = 128;

struct Sizes {
  int heads, n, d, dv, feature_map;
  float eps;
  const uint8_t* mask;  // (B, N) or null
  TAB_DEVICE bool keep(int bh, int i) const {
    return mask == nullptr || mask[static_cast<int64_t>(bh / heads) * n + i] != 0;
  }
};

/// A matrix in shared memory, or its transpose; odd row lengths spread a column over all banks.
struct Matrix {
  float* data;
  int row, column;  // strides
  TAB_DEVICE float& operator()(int i, int j) const { return data[i * row + j * column]; }
  TAB_DEVICE Matrix transposed() const { return {data, column, row}; }
};

constexpr TAB_DEVICE int odd(int size) { return size | 1; }

/// The shared memory of a block: x (N, D), y (N, Dv), t (D, Dv), z and w (D), i and r (N).
struct Shared {
  Matrix x, y, t;
  float *z, *w, *i, *r;

  TAB_DEVICE Shared(float* memory, const Sizes& a) {
    x = {memory, odd(a.d), 1};
    y = {x.data + a.n * odd(a.d), odd(a.dv), 1};
    t = {y.data + a.n * odd(a.dv), odd(a.dv), 1};
    z = t.data + a.d * odd(a.dv);
    w = z + a.d;
    i = w + a.d;
    r = i + a.n;
  }
  static constexpr int64_t bytes(int64_t n, int64_t d, int64_t dv) {
    return 4 * (n * ((d | 1) + (dv | 1)) + d * (dv | 1) + 2 * d + 2 * n);
  }
};

TAB_DEVICE float phi(float x, int map) {
  if (map == 0) return x > 0 ? x + 1 : expf(x);
  return map == 1 && x < 0 ? 0.0f : x;
}

/// φ'(x) from f = φ(x): for elu + 1 it is 1 above f = 1 and f itself below.
TAB_DEVICE float slope(float f, int map) {
  if (map == 0) return f > 1 ? 1.0f : f;
  return map == 1 && !(f > 0) ? 0.0f : 1.0f;
}

TAB_DEVICE float inverse(float den) { return den == 0 ? 0.0f : 1 / den; }

/// emit(i, j, Σ_l a(i, l) b(l, j)) for all i < m, j < n. A warp takes 32×32 results, a thread 8×4
/// of them: rows 4 apart and columns 8 apart, so that a warp's reads fall in different banks.
template <typename Emit>
TAB_DEVICE void product(int thread, int threads, int m, int n, int length, Matrix a, Matrix b,
                        Emit emit) {
  const int lane = thread % 32, across = (n + 31) / 32, tiles = (m + 31) / 32 * across;
  for (int tile = thread / 32; tile < tiles; tile += threads / 32) {
    const int i0 = tile / across * 32 + lane / 8, j0 = tile % across * 32 + lane % 8;
    float sum[8][4] = {};
    for (int l = 0; l < length; ++l) {
      float left[8], right[4];
      TAB_UNROLL
      for (int p = 0; p < 8; ++p) left[p] = a(i0 + 4 * p < m ? i0 + 4 * p : m - 1, l);
      TAB_UNROLL
      for (int c = 0; c < 4; ++c) right[c] = b(l, j0 + 8 * c < n ? j0 + 8 * c : n - 1);
      TAB_UNROLL
      for (int p = 0; p < 8; ++p) {
        TAB_UNROLL
        for (int c = 0; c < 4; ++c) sum[p][c] += left[p] * right[c];
      }
    }
    TAB_UNROLL
    for (int p = 0; p < 8; ++p) {
      TAB_UNROLL
      for (int c = 0; c < 4; ++c)
        if (i0 + 4 * p < m && j0 + 8 * c < n) emit(i0 + 4 * p, j0 + 8 * c, sum[p][c]);
    }
  }
}

/// to(i, c) = f(x[i, c], i) for all tokens i < n and columns c < d
template <typename T, typename F>
TAB_DEVICE void read(int thread, int threads, const T* x, int64_t stride, int n, int d, Matrix to,
                     F f) {
  for (int e = thread; e < n * d; e += threads)
    to(e / d, e % d) = f(wide(x[e / d * stride + e % d]), e / d);
}

/// Phases 0 to 2 of both directions: φ(k) and v; S and z; φ(q). S and z go to memory if asked.
template <typename T>
TAB_DEVICE void sum_keys(int phase, int bh, int thread, int threads, const Shared& m,
                         const Sizes& a, const Heads<const T>& q, const Heads<const T>& k,
                         const Heads<const T>& v, const float* s0, const float* z0, float* s,
                         float* z) {
  const int64_t states = static_cast<int64_t>(bh) * a.d;
  if (phase == 0) {
    read(thread, threads, k.at(bh, a.heads), k.n, a.n, a.d, m.x,
         [&](float x, int i) { return a.keep(bh, i) ? phi(x, a.feature_map) : 0.0f; });
    read(thread, threads, v.at(bh, a.heads), v.n, a.n, a.dv, m.y, [](float x, int) { return x; });
  } else if (phase == 1) {
    product(thread, threads, a.d, a.dv, a.n, m.x.transposed(), m.y, [&](int i, int j, float sum) {
      const int64_t at = (states + i) * a.dv + j;
      m.t(i, j) = sum + (s0 ? s0[at] : 0.0f);
      if (s) s[at] = m.t(i, j);
    });
    for (int i = thread; i < a.d; i += threads) {
      float sum = z0 ? z0[states + i] : 0.0f;
      for (int j = 0; j < a.n; ++j) sum += m.x(j, i);
      m.z[i] = sum;
      if (z) z[states + i] = sum;
    }
  } else {
    read(thread, threads, q.at(bh, a.heads), q.n, a.n, a.d, m.x,
         [&](float x, int) { return phi(x, a.feature_map); });
  }
}

/// 1/(φ(q_i)ᵀz + ε), with φ(q) in x
TAB_DEVICE float inverse_denominator(const Shared& m, const Sizes& a, int i) {
  float den = 0;
  for (int c = 0; c < a.d; ++c) den += m.x(i, c) * m.z[c];
  return inverse(den + a.eps);
}

/// Runs the phases of a problem.
template <typename Problem>
TAB_DEVICE void phases(const Problem& problem, unsigned char* memory) {
  TAB_UNROLL
  for (int p = 0; p < Problem::PHASES; ++p) {
    if (p > 0) __syncthreads();
    problem.phase(p, static_cast<int>(blockIdx.x), static_cast<int>(threadIdx.x), Problem::THREADS,
                  reinterpret_cast<float*>(memory));
  }
}

template <typename T>
struct LinearForward {
  static constexpr int PHASES = 5, THREADS = 128, BLOCKS = 1;
  static constexpr int64_t BYTES = Shared::bytes(MAX_TOKENS, MAX_SIZE, MAX_SIZE);
  Sizes sizes;
  Heads<const T> q, k, v;
  const float *s0, *z0;  // or null
  Heads<T> o;
  float *s, *z;

  TAB_DEVICE void operator()(unsigned char* memory) const { phases(*this, memory); }
  TAB_DEVICE void phase(int p, int bh, int thread, int threads, float* memory) const {
    const Sizes& a = sizes;
    const Shared m(memory, a);
    if (p < 3) {
      sum_keys(p, bh, thread, threads, m, a, q, k, v, s0, z0, s, z);
    } else if (p == 3) {
      for (int i = thread; i < a.n; i += threads) m.i[i] = inverse_denominator(m, a, i);
    } else {
      T* out = o.at(bh, a.heads);
      product(thread, threads, a.n, a.dv, a.d, m.x, m.t, [&](int i, int j, float sum) {
        narrow(sum * m.i[i], out + i * o.n + j);
      });
    }
  }
};

/// With g = do/den and r = -g·o: dφ(q) = S g + z r, dS = φ(q)ᵀg, dz = Σφ(q) r, dφ(k) = dS v + dz,
/// dv = dSᵀφ(k). dS takes the place of S once dq is written.
template <typename T>
struct LinearBackward {
  static constexpr int PHASES = 8, THREADS = 128, BLOCKS = 1;
  static constexpr int64_t BYTES = Shared::bytes(MAX_TOKENS, MAX_SIZE, MAX_SIZE);
  Sizes sizes;
  Heads<const T> dout, q, k, v, o;
  const float *s0, *z0, *ds, *dz;  // or null
  Heads<T> dq, dk, dv;
  float *ds0, *dz0;

  TAB_DEVICE void operator()(unsigned char* memory) const { phases(*this, memory); }
  TAB_DEVICE void phase(int p, int bh, int thread, int threads, float* memory) const {
    const Sizes& a = sizes;
    const Shared m(memory, a);
    const int64_t states = static_cast<int64_t>(bh) * a.d;
    const float* none = nullptr;
    if (p < 3) {
      sum_keys<T>(p, bh, thread, threads, m, a, q, k, v, s0, z0, nullptr, nullptr);
      if (p == 2)
        read(thread, threads, dout.at(bh, a.heads), dout.n, a.n, a.dv, m.y,
             [](float x, int) { return x; });
    } else if (p == 3) {  // y becomes g
      const T* out = o.at(bh, a.heads);
      for (int i = thread; i < a.n; i += threads) {
        const float inv = inverse_denominator(m, a, i);
        float sum = 0;
        for (int c = 0; c < a.dv; ++c) {
          m.y(i, c) *= inv;
          sum += m.y(i, c) * wide(out[i * o.n + c]);
        }
        m.r[i] = -sum;
      }
    } else if (p == 4) {
      T* out = dq.at(bh, a.heads);
      product(thread, threads, a.n, a.d, a.dv, m.y, m.t.transposed(), [&](int i, int j, float sum) {
        const float f = slope(m.x(i, j), a.feature_map);
        narrow((sum + m.r[i] * m.z[j]) * f, out + i * dq.n + j);
      });
      for (int i = thread; i < a.d; i += threads) {
        float sum = dz ? dz[states + i] : 0.0f;
        for (int j = 0; j < a.n; ++j) sum += m.x(j, i) * m.r[j];
        dz0[states + i] = m.w[i] = sum;
      }
    } else if (p == 5) {
      product(thread, threads, a.d, a.dv, a.n, m.x.transposed(), m.y, [&](int i, int j, float sum) {
        const int64_t at = (states + i) * a.dv + j;
        ds0[at] = m.t(i, j) = sum + (ds ? ds[at] : 0.0f);
      });
    } else if (p == 6) {
      sum_keys<T>(0, bh, thread, threads, m, a, q, k, v, none, none, nullptr, nullptr);
    } else {
      T* out_k = dk.at(bh, a.heads);
      T* out_v = dv.at(bh, a.heads);
      product(thread, threads, a.n, a.d, a.dv, m.y, m.t.transposed(), [&](int i, int j, float sum) {
        const float f = a.keep(bh, i) ? slope(m.x(i, j), a.feature_map) : 0.0f;
        narrow((sum + m.w[j]) * f, out_k + i * dk.n + j);
      });
      product(thread, threads, a.n, a.dv, a.d, m.x, m.t, [&](int i, int j, float sum) {
        narrow(sum, out_v + i * dv.n + j);
      });
    }
  }
};

}  // namespace tab::few
