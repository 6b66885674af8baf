// The loops of peak.cpp. Included once per instruction set.

namespace tab::TAB_ISA {

/// 12 chains of multiply-adds that wait for nothing but themselves: more than any core keeps in
/// flight, and with both operands as many registers as AVX2 has. Returns what must not be dropped.
static float multiply_adds(int64_t rounds, float factor) {
  Vec<float> sum[12];
#pragma GCC unroll 12
  for (int i = 0; i < 12; ++i) sum[i] = splat<float>(factor + i);
  const Vec<float> x = splat<float>(factor), y = splat<float>(1 - factor);
  for (int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 12
    for (int i = 0; i < 12; ++i) sum[i] = sum[i] * x + y;
#pragma GCC unroll 12
  for (int i = 1; i < 12; ++i) sum[0] += sum[i];
  return sum[0][0];
}

/// The sum of x.
static float read(const float* x, int64_t n) {
  Vec<float> total[8]{};
  for (int64_t i = 0; i + 8 * W<float> <= n; i += 8 * W<float>)
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) total[j] += load(x + i + j * W<float>);
#pragma GCC unroll 8
  for (int j = 1; j < 8; ++j) total[0] += total[j];
  return sum<float>(total[0]);
}

static void copy(const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i + W<float> <= n; i += W<float>) stream(y + i, load(x + i));
  fence();
}

constexpr PeakKernels peak_kernels = {W<float>, multiply_adds, read, copy};

}  // namespace tab::TAB_ISA
