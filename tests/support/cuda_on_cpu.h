// CUDA's device side on a CPU, as far as csrc/cuda/**/*.cuh use it: the same code, compiled by g++.
//
// Each thread of a block is a fiber. It runs until a barrier or a warp-wide instruction and waits
// there; when all the threads concerned have come to the same place, they go on. What fails:
//   a barrier that some threads do not reach, or that they reach at different places;
//   shared memory that is read before it is written: it starts as NaN;
//   a write outside of the block's shared memory (256 KiB around it are looked at afterwards);
//   a barrier that is missing: two threads touch one place and nothing orders them (cuda_races.h).
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_races.h"

// --- types ---------------------------------------------------------------------------------------

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

template <typename To, typename From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}

inline float __bfloat162float(__nv_bfloat16 x) { return bits_of<float>(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  const auto bits = bits_of<uint32_t>(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int sign = x.bits >> 15 ? -1 : 1, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
}
inline __half __float2half(float x) {
  const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
  const float size = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (size >= 65520) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = 0;
  std::frexp(size, &exponent);  // size in [2^(exponent - 1), 2^exponent)
  exponent = size < 0x1p-14f ? -13 : exponent;
  const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps))};
}

// --- threads -------------------------------------------------------------------------------------

namespace cpu {

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024, GUARD = 256 * 1024;
using Slot = std::array<uint32_t, 8>;  // what one lane hands to the others

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  enum { RUNS, AT_BLOCK, AT_WARP, DONE } state = RUNS;
  bool orders = false;  // a barrier, not a shuffle
  bool vote = false;
  std::source_location where;
  Slot given;
};

inline std::vector<Fiber> fibers;
inline std::vector<std::array<Slot, WARP>> taken;  // of each warp: what its lanes gave
inline bool voted;                                 // by a thread of the block
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void wait(decltype(Fiber::state) state, std::source_location where, bool orders = false) {
  Fiber& self = fibers[threadIdx.x];
  self.state = state, self.where = where, self.orders = orders;
  swapcontext(&self.context, &scheduler);
}

inline void enter() {
  body();
  wait(Fiber::DONE, std::source_location::current());
}

/// Lets the threads [first, last) go on if all of them wait in `state`, at one place.
inline bool release(size_t first, size_t last, decltype(Fiber::state) state) {
  for (size_t t = first; t < last; ++t)
    if (fibers[t].state != state) return false;
  for (size_t t = first; t < last; ++t) {
    if (fibers[t].where.line() != fibers[first].where.line() ||
        std::strcmp(fibers[t].where.file_name(), fibers[first].where.file_name()) != 0)
      throw std::runtime_error("threads wait at different barriers");
    fibers[t].state = Fiber::RUNS;
  }
  for (size_t t = first; t < last && state == Fiber::AT_WARP; ++t)
    taken[t / WARP][t % WARP] = fibers[t].given;
  if (state == Fiber::AT_BLOCK) {
    ++races.barrier, voted = false;
    for (auto& fiber : fibers) voted = voted || fiber.vote, fiber.vote = false;
  }
  if (state == Fiber::AT_WARP && fibers[first].orders) ++races.warp_barrier[first / WARP];
  return true;
}

/// The race that was found, each thread with the line at which it last waited.
inline std::string race() {
  const auto name = [](int t) {
    const std::string line =
        t == SEVERAL ? "" : " (after line " + std::to_string(fibers[t].where.line()) + ")";
    return (t == SEVERAL ? "several of a warp" : std::to_string(t)) + line;
  };
  return "no barrier between threads " + name(races.other) + " and " + name(races.one);
}

inline void run_threads() {
  const size_t count = fibers.size();
  for (auto& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.state = Fiber::RUNS;
    makecontext(&fiber.context, enter, 0);
  }
  const size_t warps = count / WARP;
  do {
    for (size_t i = 0; i < warps; ++i) {  // each warp as far as it comes without the others
      const size_t first = i * WARP;
      do {
        for (size_t t = first; t < first + WARP; ++t) {
          if (fibers[t].state != Fiber::RUNS) continue;
          threadIdx.x = static_cast<unsigned>(t), races.thread = static_cast<int>(t);
          swapcontext(&scheduler, &fibers[t].context);
          if (races.found) throw std::runtime_error(race());
        }
      } while (release(first, first + WARP, Fiber::AT_WARP));
    }
  } while (release(0, count, Fiber::AT_BLOCK));
  for (const auto& fiber : fibers)
    if (fiber.state != Fiber::DONE)
      throw std::runtime_error("a barrier that not all threads reach, line " +
                               std::to_string(fiber.where.line()));
}

/// Whether each of `bytes` is what memset left.
inline bool untouched(const unsigned char* begin, size_t bytes) {
  return *begin == 0xff && std::memcmp(begin, begin + 1, bytes - 1) == 0;
}

/// problem(memory) by blocks · threads; "" or what went wrong. `element`: of the least access.
template <typename Problem>
std::string run(const Problem& problem, int blocks, int threads, int64_t bytes, int element) try {
  fibers.resize(threads), taken.resize(threads / WARP);
  const size_t size = (bytes + 15) / 16 * 16;
  std::vector<float4> memory((size + 2 * GUARD) / sizeof(float4));
  auto* const begin = reinterpret_cast<unsigned char*>(memory.data());
  for (int block = 0; block < blocks; ++block) {
    std::memset(begin, 0xff, size + 2 * GUARD);  // NaN in every floating type
    blockIdx.x = block;
    body = [&] { problem(begin + GUARD); };
    races.watch(begin + GUARD, bytes, element);
    run_threads();
    races.size = 0;
    const auto* const end = begin + GUARD + bytes;
    if (!untouched(begin, GUARD) || !untouched(end, size - bytes + GUARD))
      throw std::runtime_error("a write outside of shared memory");
  }
  return "";
} catch (const std::exception& error) {
  races.size = 0;
  return error.what();
}

/// What each lane of the warp gives: valid until this lane gives again.
template <typename T>
auto exchange(T x, std::source_location where) {
  static_assert(sizeof(T) <= sizeof(Slot));
  std::memcpy(&fibers[threadIdx.x].given, &x, sizeof x);
  wait(Fiber::AT_WARP, where);
  return [all = taken[threadIdx.x / WARP].data()](int lane) {
    T one;
    std::memcpy(&one, all + lane, sizeof one);
    return one;
  };
}

}  // namespace cpu

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void __syncthreads(std::source_location where = std::source_location::current()) {
  cpu::wait(cpu::Fiber::AT_BLOCK, where, true);
}
inline int __syncthreads_or(bool x, std::source_location where = std::source_location::current()) {
  cpu::fibers[threadIdx.x].vote = x;
  cpu::wait(cpu::Fiber::AT_BLOCK, where, true);
  return cpu::voted;
}
inline void __syncwarp(std::source_location where = std::source_location::current()) {
  cpu::wait(cpu::Fiber::AT_WARP, where, true);
}
inline float __shfl_xor_sync(unsigned, float x, int mask,
                             std::source_location where = std::source_location::current()) {
  return cpu::exchange(x, where)((threadIdx.x ^ mask) % cpu::WARP);
}

namespace cpu {

/// mma.sync.m16n8k16, A row-major, B column-major: which lane holds what is in the PTX ISA, section
/// "Matrix Fragments for mma.m16n8k16 with floating point type".
template <typename Widen>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Widen widen,
         std::source_location where) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  const auto all = exchange(Fragments{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, where);
  const int lane = static_cast<int>(threadIdx.x) % WARP;
  for (int e = 0; e < 4; ++e) {
    const int row = lane / 4 + e / 2 * 8, column = lane % 4 * 2 + e % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = all(row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
      const uint32_t right = all(column * 4 + k % 8 / 2).b[k / 8];
      c[e] += widen(left >> k % 2 * 16) * widen(right >> k % 2 * 16);
    }
  }
}

}  // namespace cpu

inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half,
                std::source_location where = std::source_location::current()) {
  const auto widen = [](uint32_t x) { return __half2float({static_cast<uint16_t>(x)}); };
  cpu::mma(c, a, b, widen, where);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16,
                std::source_location where = std::source_location::current()) {
  const auto widen = [](uint32_t x) { return __bfloat162float({static_cast<uint16_t>(x)}); };
  cpu::mma(c, a, b, widen, where);
}
