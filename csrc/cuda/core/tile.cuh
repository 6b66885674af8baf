// Tiles of 64 × 64 in shared memory and their products: what the kernels for N ≤ 64 are made of.
//
// Four warps share a product A·B; each has 16 of its rows, 32 results a thread. float32 runs on FMA
// (12 16-byte reads of shared memory for 128 FMA, no bank conflicts) and is as exact as float32;
// bfloat16 and float16 run on tensor cores, mma.sync m16n8k16 (PTX ISA, "Matrix Fragments for
// mma.m16n8k16 with floating point type"), sums in float32. Rows are padded by 16 bytes, so that
// eight rows, or eight 16-byte pieces of one row, lie in different banks.
#pragma once

#include "device.cuh"

namespace tab::few {

constexpr int SIDE = 64, THREADS = 128, WARP = 32;

template <typename E>
constexpr int LINE = SIDE + 16 / static_cast<int>(sizeof(E));  // elements from row to row
template <typename E>
constexpr int TILE = SIDE * LINE<E>;  // elements of a tile

TAB_DEVICE int warp() { return static_cast<int>(threadIdx.x) / WARP; }
TAB_DEVICE int lane() { return static_cast<int>(threadIdx.x) % WARP; }
constexpr TAB_DEVICE int least(int a, int b) { return a < b ? a : b; }
/// Columns of the tile that starts at column `from`.
TAB_DEVICE int columns(int size, int from) { return least(size - from, SIDE); }

#ifdef __CUDACC__
#define TAB_MMA(type, name)                                                                  \
  TAB_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], type) { \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." name "." name                               \
        ".f32 {%0,%1,%2,%3}, "                                                               \
        "{%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                                             \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                     \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                 \
  }
TAB_MMA(__half, "f16")
TAB_MMA(__nv_bfloat16, "bf16")
#undef TAB_MMA
#endif

/// A thread's part of a 64 × 64 result. RIGHT_T: the right factor was given transposed, which for
/// float32 decides the columns a thread has (strided or in fours). A row lies within one warp.
template <typename E, bool RIGHT_T>
struct Part {
  static constexpr bool FMA = std::is_same_v<E, float>;
  static constexpr int ROWS = FMA ? 4 : 2;                      // of this thread
  static constexpr int LANES = FMA ? 8 : 4;                     // that share a row, neighbours
  static constexpr int TOGETHER = FMA ? (RIGHT_T ? 1 : 4) : 2;  // results side by side in a row
  float x[32] = {};

  /// The thread's which-th row; of its result e: which row, which column.
  static TAB_DEVICE int row(int which) {
    return warp() * 16 + (FMA ? lane() / 8 * 4 + which : lane() / 4 + 8 * which);
  }
  static constexpr TAB_DEVICE int which(int e) { return FMA ? e / 8 : e % 4 / 2; }
  static TAB_DEVICE int column(int e) {
    if (!FMA) return e / 4 * 8 + lane() % 4 * 2 + e % 2;
    return RIGHT_T ? e % 8 * 8 + lane() % 8 : e % 8 / 4 * 32 + lane() % 8 * 4 + e % 4;
  }
};

/// sums[r] = Σ over the lanes that share row r; in the same order for all of them.
template <typename P>
TAB_DEVICE void add_lanes(float (&sums)[P::ROWS]) {
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    TAB_UNROLL
    for (int m = 1; m < P::LANES; m *= 2) sums[r] += __shfl_xor_sync(ALL_LANES, sums[r], m);
  }
}

template <typename P>
TAB_DEVICE void top_lanes(float (&tops)[P::ROWS]) {
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    TAB_UNROLL
    for (int m = 1; m < P::LANES; m *= 2)
      tops[r] = fmaxf(tops[r], __shfl_xor_sync(ALL_LANES, tops[r], m));
  }
}

// --- products ------------------------------------------------------------------------------------

TAB_DEVICE void four(const float* from, float (&to)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(from);
  to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
}

struct Product {
  TAB_DEVICE float operator()(float left, float right, int) const { return left * right; }
};

/// part += A·B over `length` inner indices, rounded up to 4; A is a or aᵀ, B is b or bᵀ. f(left,
/// right, e) may take the place of the product of two elements, for result e.
template <bool LEFT_T, bool RIGHT_T, typename F = Product>
TAB_DEVICE void multiply(Part<float, RIGHT_T>& part, const float* a, const float* b, int rows,
                         int length, F f = {}) {
  constexpr int line = LINE<float>;
  if (warp() * 16 >= rows) return;
  const int i = part.row(0), j = lane() % 8;
  TAB_ROLLED  // unrolled further it would spill
  for (int l = 0; l < length; l += 4) {
    float left[4][4], right[8][4];  // left: [l][row] if LEFT_T, else [row][l]
    TAB_UNROLL
    for (int p = 0; p < 4; ++p)
      four(LEFT_T ? a + (l + p) * line + i : a + (i + p) * line + l, left[p]);
    TAB_UNROLL
    for (int p = 0; p < 8; ++p)  // [column][l] if RIGHT_T, else [l and half][column]
      four(RIGHT_T ? b + (j + 8 * p) * line + l : b + (l + p / 2) * line + p % 2 * 32 + j * 4,
           right[p]);
    TAB_UNROLL
    for (int e = 0; e < 32; ++e) {
      const int r = e / 8, c = e % 8;
      TAB_UNROLL
      for (int s = 0; s < 4; ++s)
        part.x[e] += f(LEFT_T ? left[s][r] : left[r][s],
                       RIGHT_T ? right[c][s] : right[2 * s + c / 4][c % 4], e);
    }
  }
}

/// Elements (i, l) and (i, l + 1) of a tile, or of its transpose, as one register.
template <bool TRANSPOSED, typename E>
TAB_DEVICE uint32_t pair(const E* tile, int i, int l) {
  if constexpr (TRANSPOSED) {
    const auto* bits = reinterpret_cast<const uint16_t*>(tile) + l * LINE<E> + i;
    return bits[0] | static_cast<uint32_t>(bits[LINE<E>]) << 16;
  } else {
    return *reinterpret_cast<const uint32_t*>(tile + i * LINE<E> + l);
  }
}

/// The same on tensor cores; `length` is rounded up to 16.
template <bool LEFT_T, bool RIGHT_T, typename E>
TAB_DEVICE void multiply(Part<E, RIGHT_T>& part, const E* a, const E* b, int rows, int length) {
  if (warp() * 16 >= rows) return;
  const int i = part.row(0), g = lane() / 4, t = lane() % 4 * 2;
  TAB_ROLLED  // unrolled further it would spill
  for (int l = 0; l < length; l += 16) {
    uint32_t left[4], right[2];
    TAB_UNROLL
    for (int p = 0; p < 4; ++p) left[p] = pair<LEFT_T>(a, i + p % 2 * 8, l + t + p / 2 * 8);
    TAB_UNROLL
    for (int c = 0; c < 8; ++c) {
      TAB_UNROLL
      for (int p = 0; p < 2; ++p) right[p] = pair<!RIGHT_T>(b, c * 8 + g, l + t + p * 8);
      mma(reinterpret_cast<float (&)[4]>(part.x[c * 4]), left, right, E{});
    }
  }
}

// --- between registers, shared and global memory -------------------------------------------------

struct Same {
  TAB_DEVICE float operator()(float x, int, int) const { return x; }
};

/// tile(i, c) = f(x[i, c], i, c) for i of `rows` and c < d, zero elsewhere: a weight of 0 would not
/// hide the NaN that a masked row may hold. A thread has AHEAD reads in flight, which hide the way to
/// memory and take four registers each.
template <int AHEAD = 8, typename E, typename T, typename F = Same>
TAB_DEVICE void load(E* tile, const T* x, int64_t stride, const Tokens& rows, int d, F f = {}) {
  constexpr int PIECE = 16 / static_cast<int>(sizeof(T));  // elements read at once
  if (d % PIECE == 0 && stride % PIECE == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    TAB_UNROLL_AHEAD
    for (int turn = 0; turn < SIDE * SIDE / PIECE / THREADS; ++turn) {
      const int e = turn * THREADS + static_cast<int>(threadIdx.x);
      const int i = e / (SIDE / PIECE), c = e % (SIDE / PIECE) * PIECE;
      const bool inside = c < d && rows(i);
      uint4 bits{};
      if (inside) bits = *reinterpret_cast<const uint4*>(x + i * stride + c);
      E* const to = tile + i * LINE<E> + c;
      if constexpr (std::is_same_v<E, T> && std::is_same_v<F, Same>) {
        *reinterpret_cast<uint4*>(to) = bits;
      } else {
        T piece[PIECE];
        memcpy(piece, &bits, sizeof bits);
        constexpr int BATCH = least(PIECE, 16 / static_cast<int>(sizeof(E)));  // written at once
        struct alignas(BATCH * sizeof(E)) Batch {
          E x[BATCH];
        };
        TAB_UNROLL
        for (int p = 0; p < PIECE; p += BATCH) {
          Batch made;
          TAB_UNROLL
          for (int l = 0; l < BATCH; ++l)
            narrow(inside ? f(wide(piece[p + l]), i, c + p + l) : 0.0f, made.x + l);
          *reinterpret_cast<Batch*>(to + p) = made;
        }
      }
    }
  } else {
    TAB_ROLLED
    for (int e = static_cast<int>(threadIdx.x); e < SIDE * SIDE; e += THREADS) {
      const int i = e / SIDE, c = e % SIDE;
      const bool inside = c < d && rows(i);
      narrow(inside ? f(wide(x[i * stride + c]), i, c) : 0.0f, tile + i * LINE<E> + c);
    }
  }
}

/// Whose q and o a backward pass reads: real tokens, and those whose output has a cotangent. What
/// another holds, nobody learns of. `room` is SIDE bytes of shared memory; there is a barrier.
template <typename T>
TAB_DEVICE Tokens heard(uint8_t* room, const Tokens& real, const T* dout, int64_t stride, int dv,
                        const float* dlse = nullptr) {
  if (real.mask == nullptr) return real;
  TAB_ROLLED
  for (int p = 0; p < 4; ++p) {
    const int i = static_cast<int>(threadIdx.x) * 4 + p;
    if (i >= SIDE) break;
    bool one = real(i) || (dlse != nullptr && i < real.n && dlse[i] != 0);
    for (int c = 0; !one && i < real.n && c < dv; ++c) one = wide(dout[i * stride + c]) != 0;
    room[i] = one;
  }
  __syncthreads();
  return {real.n, room};
}

/// tile = part
template <typename E, bool RIGHT_T>
TAB_DEVICE void keep(const Part<E, RIGHT_T>& part, E* tile) {
  TAB_UNROLL
  for (int e = 0; e < 32; ++e)
    narrow(part.x[e], tile + part.row(part.which(e)) * LINE<E> + part.column(e));
}

/// part = the tile's elements that are its own
template <typename E, bool RIGHT_T>
TAB_DEVICE void take(Part<E, RIGHT_T>& part, const E* tile) {
  TAB_UNROLL
  for (int e = 0; e < 32; ++e)
    part.x[e] = wide(tile[part.row(part.which(e)) * LINE<E> + part.column(e)]);
}

/// to = from in the other arrangement, by way of a tile whose rows only this warp uses
TAB_DEVICE void regroup(Part<float, false>& to, const Part<float, true>& from, float* tile) {
  __syncwarp();
  keep(from, tile);
  __syncwarp();
  take(to, tile);
}

/// to[i, c] = part(i, c)·factors[i] for i < n, c < d
template <typename T, typename P>
TAB_DEVICE void write(const P& part, T* to, int64_t stride, int n, int d,
                      const float (&factors)[P::ROWS]) {
  constexpr int W = P::TOGETHER;
  struct alignas(W * sizeof(T)) Pack {
    T x[W];
  };
  const bool whole =
      d % W == 0 && stride % W == 0 && reinterpret_cast<uintptr_t>(to) % sizeof(Pack) == 0;
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) {
    if (part.row(r) >= n) continue;
    T* const line = to + part.row(r) * stride;
    TAB_UNROLL
    for (int e = 0; e < 32; e += W) {
      const int c = part.column(e);
      if (part.which(e) != r || c >= d) continue;
      Pack pack;
      TAB_UNROLL
      for (int p = 0; p < W; ++p) narrow(part.x[e + p] * factors[r], pack.x + p);
      if (whole) {
        *reinterpret_cast<Pack*>(line + c) = pack;
      } else {
        TAB_UNROLL
        for (int p = 0; p < W; ++p)
          if (c + p < d) line[c + p] = pack.x[p];
      }
    }
  }
}

template <typename T, typename P>
TAB_DEVICE void write(const P& part, T* to, int64_t stride, int n, int d, float factor = 1) {
  float factors[P::ROWS];
  TAB_UNROLL
  for (int r = 0; r < P::ROWS; ++r) factors[r] = factor;
  write(part, to, stride, n, d, factors);
}

}  // namespace tab::few
