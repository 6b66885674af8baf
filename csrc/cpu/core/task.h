// How a CPU kernel runs: which instruction set, on which threads, in which scratch memory.
//
// Everything here is compiled for the baseline instruction set.
#pragma once

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <string_view>

#include "../../common.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define TAB_WIDE 1
#else
#define TAB_WIDE 0  // other machines: the baseline, in the vectors the compiler has
#endif

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(from, bytes) ((void)0)
#define ASAN_UNPOISON_MEMORY_REGION(from, bytes) ((void)0)
#endif

namespace tab {

// --- instruction sets -----------------------------------------------------------------------------

enum class Isa { baseline, avx2, avx512 };

/// The widest instruction set of this machine, or the lower one that TAB_ISA names.
inline Isa isa() {
  static const Isa chosen = [] {
    Isa best = Isa::baseline;
#if TAB_WIDE
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = Isa::avx2;
    if (best == Isa::avx2 && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      best = Isa::avx512;
#endif
    const char* asked = std::getenv("TAB_ISA");
    if (asked == nullptr || *asked == 0) return best;
    const std::string_view name(asked);
    Isa wanted = name == "avx512" ? Isa::avx512 : name == "avx2" ? Isa::avx2 : Isa::baseline;
    STD_TORCH_CHECK(wanted != Isa::baseline || name == "baseline", "TAB_ISA=", asked,
                    " is none of baseline, avx2, avx512");
    STD_TORCH_CHECK(wanted <= best, "TAB_ISA=", asked, ": this machine or build does not have it");
    return wanted;
  }();
  return chosen;
}

/// One table of kernel functions out of those that each_isa.h compiled.
#if TAB_WIDE
#define TAB_SELECT(table)                                    \
  (::tab::isa() == ::tab::Isa::avx512 ? ::tab::avx512::table \
   : ::tab::isa() == ::tab::Isa::avx2 ? ::tab::avx2::table   \
                                      : ::tab::baseline::table)
#else
#define TAB_SELECT(table) (::tab::isa(), ::tab::baseline::table)
#endif

// --- threads --------------------------------------------------------------------------------------

inline int64_t threads() { return torch::stable::get_num_threads(); }

/// f(task) for every task in [0, tasks), on torch's own threads; a free thread takes the next task.
/// f must not throw.
template <class F>
void parallel(int64_t tasks, const F& f) {
  std::atomic<int64_t> next{0};
  const int64_t workers = tasks < threads() ? tasks : threads();
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    // More workers than chunks when torch runs this serially: the first one then does all.
    for (; begin < end; ++begin)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) f(task);
  });
}

/// Into how many segments of whole tiles each of `rows` independent sequences is cut, so that no
/// thread idles: 1 when there are enough sequences.
inline int64_t segments(int64_t rows, int64_t tiles) {
  const int64_t workers = threads();
  if (rows >= 4 * workers || rows % workers == 0) return 1;
  const int64_t wanted = ceiling(4 * workers, rows);
  const int64_t most = tiles / 4 > 1 ? tiles / 4 : 1;  // a segment shorter than 4 tiles costs more
  return wanted < most ? wanted : most;
}

// --- scratch --------------------------------------------------------------------------------------

/// Hands out cache-line aligned pieces of one buffer. Passed by value: what a callee takes is free
/// again when it returns. Under AddressSanitizer the gap behind a piece is out of bounds.
template <class A>
struct Arena {
  A* next;
  /// How much of the buffer a piece of n elements uses up.
  static constexpr int64_t cost(int64_t n) { return up(n, 16) + 16; }
  A* take(int64_t n) {
    A* piece = next;
    next += cost(n);
    ASAN_UNPOISON_MEMORY_REGION(piece, n * sizeof(A));
    ASAN_POISON_MEMORY_REGION(piece + n, (cost(n) - n) * sizeof(A));
    return piece;
  }
};

/// This thread's buffer, at least `count` elements; it only grows, so tiles cost no allocation.
template <class A>
Arena<A> arena(int64_t count) {
  struct Free {
    void operator()(A* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  static thread_local std::unique_ptr<A[], Free> buffer;
  static thread_local int64_t size = 0;
  if (size < count) {
    buffer.reset();
    buffer.reset(static_cast<A*>(::operator new[](count * sizeof(A), std::align_val_t(64))));
    size = count;
  }
  ASAN_UNPOISON_MEMORY_REGION(buffer.get(), count * sizeof(A));
  ASAN_POISON_MEMORY_REGION(buffer.get() + count, (size - count) * sizeof(A));
  return {buffer.get()};
}

}  // namespace tab
