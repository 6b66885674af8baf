// The products of tensor cores: mma.sync, whose operands are registers of one warp.
#pragma once
#include "machine.h"
#include "numbers.h"

namespace ptx {

// Element (i, j) of a lane's share of D and C (16 × 8): rows l / 4 and l / 4 + 8, columns from
// 2(l % 4) on, register 2 · (lower half) + (odd column).
struct Place {
  int row, column;
};
inline Place of_sum(int lane, int r) { return {lane / 4 + r / 2 * 8, lane % 4 * 2 + r % 2}; }

// A (16 × K) and B (K × 8, here by columns) of a warp; a register holds one tf32 or two halves.
template <class T, int K>
void operand_a(Warp& w, const uint32_t* o, float (&a)[16][K]) {
  constexpr int per = 4 / sizeof(T), registers = K / (2 * per);
  for (int r = 0; r < registers; ++r)
    for (int l = 0; l < LANES; ++l)
      for (int i = 0; i < per; ++i)
        a[l / 4 + r % 2 * 8][l % 4 * per + r / 2 * (4 * per) + i] =
            wide(w.at<T>(o[r])[l * per + i]);
}

template <class T, int K>
void operand_b(Warp& w, const uint32_t* o, float (&b)[8][K]) {
  constexpr int per = 4 / sizeof(T), registers = K / (4 * per);
  for (int r = 0; r < registers; ++r)
    for (int l = 0; l < LANES; ++l)
      for (int i = 0; i < per; ++i)
        b[l / 4][l % 4 * per + r * (4 * per) + i] = wide(w.at<T>(o[r])[l * per + i]);
}

// o: 4 registers of D, those of A and B, 4 of C
template <class T, int K>
void mma(Warp& w, const uint32_t* o, Mask m) {
  together(m, "mma");
  constexpr int per = 4 / sizeof(T), in_a = K / (2 * per), in_b = K / (4 * per);
  float a[16][K], b[8][K];
  operand_a<T, K>(w, o + 4, a);
  operand_b<T, K>(w, o + 4 + in_a, b);
  float d[4][LANES];
  for (int r = 0; r < 4; ++r)
    for (int l = 0; l < LANES; ++l) {
      const auto [row, column] = of_sum(l, r);
      double sum = 0;
      for (int k = 0; k < K; ++k) sum += double(a[row][k]) * b[column][k];
      d[r][l] = float(sum + w.at<float>(o[4 + in_a + in_b + r])[l]);
    }
  for (int r = 0; r < 4; ++r) std::memcpy(w.at<float>(o[r]), d[r], sizeof d[r]);
}

inline void matrices(Table& t) {
  t["mma.m16n8k4.tf32"] = {mma<TF32, 4>, ""}, t["mma.m16n8k8.tf32"] = {mma<TF32, 8>, ""};
  t["mma.m16n8k8.bf16"] = {mma<BF16, 8>, ""}, t["mma.m16n8k16.bf16"] = {mma<BF16, 16>, ""};
  t["mma.m16n8k8.f16"] = {mma<F16, 8>, ""}, t["mma.m16n8k16.f16"] = {mma<F16, 16>, ""};
}

}  // namespace ptx
