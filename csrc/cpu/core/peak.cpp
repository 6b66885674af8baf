// tab::peak on the CPU: what this machine does at most, in the instruction set of the kernels and on
// their threads. `tab bench` times it (tab/bench/roofline.py) and holds every op against it.

#include "task.h"

namespace tab {

struct PeakKernels {
  int64_t lanes;
  float (*multiply_adds)(int64_t rounds, float factor);
  float (*read)(const float* x, int64_t n);
  void (*copy)(const float* x, float* y, int64_t n);
};

}  // namespace tab

#define TAB_KERNEL "../core/peak_kernel.h"
#include "each_isa.h"

namespace tab {
namespace {

/// `what` 0: `rounds` of 12 multiply-adds a thread; returns the FLOPs. 1: reads x, contiguous
/// float32, `rounds` times; 2: copies half of x onto the other, past the caches; both return the
/// bytes that were moved.
double peak(Tensor x, int64_t what, int64_t rounds) {
  STD_TORCH_CHECK(what >= 0 && what <= 2, "peak: what is 0, 1 or 2");
  check_dtype("peak", "x", x, ScalarType::Float);
  const PeakKernels& kernels = TAB_SELECT(peak_kernels);
  float* data = static_cast<float*>(x.data_ptr());
  const int64_t team = threads(), part = x.numel() / team / 256 * 256, half = part / 2;
  STD_TORCH_CHECK(part > 0, "peak: x has fewer than 256 numbers a thread");
  parallel(team, [&](int64_t i) {
    float* mine = data + i * part;
    if (what == 0) mine[0] = kernels.multiply_adds(rounds, 0.5f);
    for (int64_t r = 0; what == 1 && r < rounds; ++r) mine[0] += kernels.read(mine, part);
    for (int64_t r = 0; what == 2 && r < rounds; ++r) kernels.copy(mine, mine + half, half);
  });
  return what == 0 ? 2.0 * 12 * kernels.lanes * team * rounds : 4.0 * team * part * rounds;
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_FRAGMENT(tab, m) {
  m.def("peak(Tensor(a!) x, int what, int rounds) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) { m.impl("peak", TORCH_BOX(&tab::peak)); }
