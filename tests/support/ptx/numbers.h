// The formats of PTX's floating-point numbers.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

namespace ptx {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

inline float wide(BF16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

inline float wide(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 0) return std::copysign(float(fraction) * 0x1p-24f, std::bit_cast<float>(sign));
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7F800000 | fraction << 13);
  return std::bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
}

// To the nearest, ties to even.
template <class T>
T narrow(float x);

template <>
inline BF16 narrow<BF16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <>
inline F16 narrow<F16>(float x) {
  const uint16_t sign = uint16_t(std::bit_cast<uint32_t>(x) >> 16 & 0x8000);
  const float size = std::fabs(x);
  if (x != x) return {0x7FFF};
  if (size < 0x1p-14f) return {uint16_t(sign | uint16_t(std::nearbyint(size * 0x1p24f)))};
  const uint32_t bits = std::bit_cast<uint32_t>(size);
  const uint32_t rounded = (bits + 0xFFF + (bits >> 13 & 1)) >> 13;
  return {uint16_t(sign | (rounded >= 143 << 10 ? 0x7C00 : rounded - (112 << 10)))};
}

inline uint32_t rounded_tf32(float x) {  // cvt.rna: ties away from zero
  return (std::bit_cast<uint32_t>(x) + 0x1000) & 0xFFFFE000;
}

// What a tensor core reads of a register: the last 13 bits of a tf32 operand are dropped.
struct TF32 {
  uint32_t bits;
};
inline float wide(TF32 x) { return std::bit_cast<float>(x.bits & 0xFFFFE000); }

}  // namespace ptx
