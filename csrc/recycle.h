// Memory for large outputs on the CPU, kept when a tensor dies and given to the next one.
//
// The C library returns large blocks to the system, which must clear every page again before the
// next call may write it: at 67 MB of outputs (`linear`, B 1 H 8 N 8192 D 64, forward and backward)
// that was a third of the time of the call. PyTorch does the same on a GPU. At most
// TAB_KEEP_MIB MiB (512 unless set; 0 keeps nothing) wait for their next use.
#pragma once

#include <cstdlib>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace tab {

class Recycler {
 public:
  static constexpr int64_t page = int64_t{2} << 20;  // blocks are whole large pages

  /// For the whole process; never destroyed, since tensors may outlive every static object.
  static Recycler& of_process() {
    static Recycler* const one = new Recycler;
    return *one;
  }

  void* take(int64_t bytes) {
    {
      const std::lock_guard<std::mutex> hold(lock_);
      for (auto block = free_.rbegin(); block != free_.rend(); ++block)
        if (block->bytes == bytes) {  // the latest one: the likeliest to be in a cache
          void* const data = block->data;
          kept_ -= bytes;
          free_.erase(std::next(block).base());
          return data;
        }
    }
    void* const data = std::aligned_alloc(page, bytes);
    STD_TORCH_CHECK(data != nullptr, "tab: no memory for an output of ", bytes, " bytes");
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);  // a hint, never an error
#endif
    return data;
  }

  void give(void* data, int64_t bytes) {
    std::vector<void*> leaving;
    {
      const std::lock_guard<std::mutex> hold(lock_);
      free_.push_back({data, bytes}), kept_ += bytes;
      for (; kept_ > limit_; free_.pop_front())
        leaving.push_back(free_.front().data), kept_ -= free_.front().bytes;
    }
    for (void* block : leaving) std::free(block);
  }

 private:
  struct Block {
    void* data;
    int64_t bytes;
  };
  std::mutex lock_;
  std::deque<Block> free_;  // the oldest first
  int64_t kept_ = 0, limit_ = keep();

  static int64_t keep() {
    const char* text = std::getenv("TAB_KEEP_MIB");
    if (text == nullptr || *text == 0) return int64_t{512} << 20;
    char* end;
    const long long mib = std::strtoll(text, &end, 10);
    STD_TORCH_CHECK(*end == 0 && mib >= 0, "TAB_KEEP_MIB=", text, " is no number of MiB");
    return mib << 20;
  }
};

/// An uninitialised contiguous tensor on the device of `like`.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, std::vector<int64_t> sizes,
                                   std::optional<torch::headeronly::ScalarType> dtype = {}) {
  using torch::headeronly::ScalarType;
  const ScalarType type = dtype.value_or(like.scalar_type());
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  constexpr int64_t page = Recycler::page;
  const int64_t width = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  const int64_t bytes = (count * width + page - 1) / page * page;
  if (!like.is_cpu() || count * width < page) return torch::stable::new_empty(like, sizes, type);
  return torch::stable::from_blob(
      Recycler::of_process().take(bytes), sizes, strides, like.device(), type,
      [bytes](void* data) { Recycler::of_process().give(data, bytes); });
}

}  // namespace tab
