// Memory for outputs: torch's own, so that a storage can be resized or shared like any other.
//
// By default the C library returns large blocks to the system, which must clear every page again
// before the next call may write it: at 67 MB of outputs (`linear`, B 1 H 8 N 8192 D 64, forward
// and backward) that was a third of the time of the call. PyTorch keeps freed memory too, on a GPU.
// From the first large output on, for the whole process, glibc keeps up to TAB_KEEP_MIB MiB free at
// the end of its heap (512 unless set; 0 changes nothing), as tab/machine.py has it do in training.
// Outputs ask for large pages: with small ones, `linear` (N 64, 2 MiB outputs) is 3 % slower. An
// output begins and ends within a large page, which is one only if all of it is mapped before it is
// first written; so the heap grows by many of them at a time.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace tab {

inline void keep_freed_memory() {
  static const long long kept = [] {
    const char* text = std::getenv("TAB_KEEP_MIB");
    if (text == nullptr || *text == 0) text = "512";
    char* end;
    const long long mib = std::strtoll(text, &end, 10);
    STD_TORCH_CHECK(*end == 0 && mib >= 0, "TAB_KEEP_MIB=", text, " is no number of MiB");
#if defined(__GLIBC__)
    if (mib > 0) {
      mallopt(M_MMAP_MAX, 0);
      mallopt(M_TRIM_THRESHOLD, static_cast<int>(std::min(mib, 2047ll) << 20));
      mallopt(M_TOP_PAD, 64 << 20);
    }
#endif
    return mib;
  }();
  static_cast<void>(kept);
}

/// An uninitialised contiguous tensor on the device of `like`.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, std::vector<int64_t> sizes,
                                   std::optional<torch::headeronly::ScalarType> dtype = {}) {
  using torch::headeronly::ScalarType;
  const ScalarType type = dtype.value_or(like.scalar_type());
  constexpr int64_t page = int64_t{2} << 20;  // a large one
  int64_t bytes = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  for (int64_t size : sizes) bytes *= size;
  const bool large = like.is_cpu() && bytes >= page;
  if (large) keep_freed_memory();
  const torch::stable::Tensor x = torch::stable::new_empty(like, sizes, type);
#if defined(__linux__)
  const auto start = reinterpret_cast<uintptr_t>(large ? x.data_ptr() : nullptr);
  const uintptr_t from = start / page * page, to = (start + bytes + page - 1) / page * page;
  if (large)
    madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);  // a hint, never an error
#endif
  return x;
}

}  // namespace tab
