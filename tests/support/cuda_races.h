// Races in shared memory: two threads of a block touch one place, one of them writes, and nothing
// orders them, be it __syncthreads, or __syncwarp within a warp (shuffles and mma order nothing).
//
// g++ -fsanitize=thread puts a call before each access to memory; the runtime that belongs to it is
// not linked, these are the calls. For each element of shared memory they keep who wrote it last and
// who of each warp read it last, and between which barriers. So a barrier that is missing is found in
// whatever order the threads ran.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cpu {

struct Access {
  uint32_t barrier, warp_barrier;  // how many the thread had passed
  int thread;                      // or SEVERAL
};
constexpr int SEVERAL = -1, WARPS = 4;
struct Place {
  Access write, read[WARPS];
};
struct Races {
  uintptr_t begin = 0, size = 0;  // of shared memory
  int shift = 1;                  // a Place stands for 1 << shift bytes
  Place* places = nullptr;        // those of `kept`
  std::vector<Place> kept;
  uint32_t barrier = 0, warp_barrier[WARPS] = {};
  int thread = 0;  // that runs
  int one = 0, other = 0;
  bool found = false;

  void watch(const void* memory, size_t bytes, unsigned element) {
    begin = reinterpret_cast<uintptr_t>(memory), size = bytes, shift = std::countr_zero(element);
    kept.resize(std::max(kept.size(), bytes / element + 1));
    places = kept.data();
    ++barrier, found = false;  // whatever stands in `places` is from before it
  }
};
inline Races races;

// The calls come by the hundred million: nothing in them is watched, and all of it is inlined.
#define TAB_UNWATCHED __attribute__((no_sanitize("thread", "undefined")))
#define TAB_HOOK TAB_UNWATCHED __attribute__((always_inline)) inline

TAB_HOOK bool unordered(const Access& a, int warp) {
  const int mine = races.thread / 32;
  return a.barrier == races.barrier && a.thread != races.thread &&
         (warp != mine || a.warp_barrier == races.warp_barrier[mine]);
}

TAB_HOOK void touch(void* at, uintptr_t bytes, bool writes) {
  Races& all = races;
  const uintptr_t offset = reinterpret_cast<uintptr_t>(at) - all.begin;
  if (offset >= all.size) return;
  const int warp = all.thread / 32;
  const Access now{all.barrier, all.warp_barrier[warp], all.thread};
  for (uintptr_t i = offset >> all.shift; i << all.shift < offset + bytes; ++i) {
    Place& place = all.places[i];
    bool clash = unordered(place.write, place.write.thread / 32);
    if (clash) all.other = place.write.thread;
    for (int w = 0; writes && w < WARPS; ++w)
      if (unordered(place.read[w], w)) clash = true, all.other = place.read[w].thread;
    if (clash) all.one = all.thread, all.found = true;
    if (writes) {
      place.write = now;
    } else {
      const bool shared = unordered(place.read[warp], warp);
      place.read[warp] = now;
      if (shared) place.read[warp].thread = SEVERAL;
    }
  }
}

}  // namespace cpu

extern "C" {
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
TAB_UNWATCHED void __tsan_func_entry(void*) {}
TAB_UNWATCHED void __tsan_func_exit() {}
#define TAB_ACCESS(bytes)                                                           \
  TAB_UNWATCHED void __tsan_read##bytes(void* at) { cpu::touch(at, bytes, false); } \
  TAB_UNWATCHED void __tsan_write##bytes(void* at) { cpu::touch(at, bytes, true); }
TAB_ACCESS(1)
TAB_ACCESS(2)
TAB_ACCESS(4)
TAB_ACCESS(8)
TAB_ACCESS(16)
#undef TAB_ACCESS
TAB_UNWATCHED void __tsan_read_range(void* at, uintptr_t bytes) { cpu::touch(at, bytes, false); }
TAB_UNWATCHED void __tsan_write_range(void* at, uintptr_t bytes) { cpu::touch(at, bytes, true); }
}
