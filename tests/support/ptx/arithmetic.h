// Instructions on one lane's numbers: integers, floating point, comparisons, conversions.
#pragma once
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

namespace ptx {

// d = f(a, b) for each type of the list: names(t, "add", f) makes add.s32, add.u64, …
template <class T>
std::string name_of() {
  if constexpr (std::is_same_v<T, float>) return "f32";
  return (std::is_signed_v<T> ? "s" : "u") + std::to_string(8 * sizeof(T));
}

template <class... T, class F>
void binary(Table& t, const std::string& name, F f) {
  ((t[name + "." + name_of<T>()] = each<T, T, T>(f)), ...);
}

template <class... T, class F>
void unary(Table& t, const std::string& name, F f) {
  ((t[name + "." + name_of<T>()] = each<T, T>(f)), ...);
}

#define TAB_INTEGERS uint16_t, int16_t, uint32_t, int32_t, uint64_t, int64_t

// Division by zero gives all ones, as on the device: no kernel may depend on it.
template <class T>
T quotient(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - a);
  return T(a / b);
}

inline void integers(Table& t) {
  binary<TAB_INTEGERS>(t, "add", []<class T>(T a, T b) { return T(a + b); });
  binary<TAB_INTEGERS>(t, "sub", []<class T>(T a, T b) { return T(a - b); });
  binary<TAB_INTEGERS>(t, "mul.lo", []<class T>(T a, T b) { return T(a * b); });
  binary<TAB_INTEGERS>(t, "min", []<class T>(T a, T b) { return a < b ? a : b; });
  binary<TAB_INTEGERS>(t, "max", []<class T>(T a, T b) { return a < b ? b : a; });
  binary<TAB_INTEGERS>(t, "div", []<class T>(T a, T b) { return quotient(a, b); });
  binary<TAB_INTEGERS>(t, "rem", []<class T>(T a, T b) { return T(a - quotient(a, b) * b); });
  unary<int16_t, int32_t, int64_t>(t, "neg", []<class T>(T a) { return T(-a); });
  unary<int16_t, int32_t, int64_t>(t, "abs", []<class T>(T a) { return T(a < 0 ? -a : a); });
  t["mul.hi.u32"] = each<uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); });
  t["mul.hi.s32"] = each<int32_t, int32_t, int32_t>(
      [](int32_t a, int32_t b) { return int32_t(int64_t(a) * b >> 32); });
  auto mad = []<class T>(T a, T b, T c) { return T(a * b + c); };
  t["mad.lo.s32"] = each<int32_t, int32_t, int32_t, int32_t>(mad);
  t["mad.lo.s64"] = each<int64_t, int64_t, int64_t, int64_t>(mad);
  auto wide_product = []<class T>(T a, T b) {
    using Wide = std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>;
    return Wide(a) * Wide(b);
  };
  t["mul.wide.s32"] = each<int64_t, int32_t, int32_t>(wide_product);
  t["mul.wide.u32"] = each<uint64_t, uint32_t, uint32_t>(wide_product);
  t["mul.wide.s16"] = each<int32_t, int16_t, int16_t>(wide_product);
  t["mul.wide.u16"] = each<uint32_t, uint16_t, uint16_t>(wide_product);
  t["mad.wide.s32"] = each<int64_t, int32_t, int32_t, int64_t>(
      [](int64_t a, int64_t b, int64_t c) { return a * b + c; });
  t["mad.wide.u32"] = each<uint64_t, uint32_t, uint32_t, uint64_t>(
      [](uint64_t a, uint64_t b, uint64_t c) { return a * b + c; });
}

template <class T, class S = std::make_signed_t<T>>
void bits_of(Table& t, const std::string& size) {
  constexpr uint32_t most = 8 * sizeof(T);
  t["and.b" + size] = each<T, T, T>([](T a, T b) { return T(a & b); });
  t["or.b" + size] = each<T, T, T>([](T a, T b) { return T(a | b); });
  t["xor.b" + size] = each<T, T, T>([](T a, T b) { return T(a ^ b); });
  t["not.b" + size] = each<T, T>([](T a) { return T(~a); });
  t["mov.b" + size] = each<T, T>([](T a) { return a; });
  t["selp.b" + size] = each<T, T, T, bool>([](T a, T b, bool p) { return p ? a : b; });
  t["shl.b" + size] =
      each<T, T, uint32_t>([](T a, uint32_t n) { return n < most ? T(a << n) : T(0); });
  t["shr.u" + size] =
      each<T, T, uint32_t>([](T a, uint32_t n) { return n < most ? T(a >> n) : T(0); });
  t["shr.s" + size] =
      each<S, S, uint32_t>([](S a, uint32_t n) { return S(a >> (n < most ? n : most - 1)); });
}

inline uint32_t permuted(uint32_t a, uint32_t b, uint32_t how) {  // prmt
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t pick = how >> 4 * i & 15;
    uint32_t byte = uint32_t(bytes >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << 8 * i;
  }
  return out;
}

inline void bits(Table& t) {
  bits_of<uint16_t>(t, "16"), bits_of<uint32_t>(t, "32"), bits_of<uint64_t>(t, "64");
  t["and.pred"] = each<bool, bool, bool>([](bool a, bool b) { return a && b; });
  t["or.pred"] = each<bool, bool, bool>([](bool a, bool b) { return a || b; });
  t["xor.pred"] = each<bool, bool, bool>([](bool a, bool b) { return a != b; });
  t["not.pred"] = each<bool, bool>([](bool a) { return !a; });
  t["mov.pred"] = each<bool, bool>([](bool a) { return a; });
  t["prmt.b32"] = each<uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t how) { return permuted(a, b, how); });
  t["bfe.u32"] =
      each<uint32_t, uint32_t, uint32_t, uint32_t>([](uint32_t a, uint32_t at, uint32_t size) {
        return at > 31 ? 0u : uint32_t(a >> at & ((uint64_t(1) << std::min(size, 32u)) - 1));
      });
  t["bfe.s32"] =
      each<int32_t, int32_t, uint32_t, uint32_t>([](int32_t a, uint32_t at, uint32_t size) {
        const int64_t left = int64_t(a) << (64 - std::min(at + size, 32u));
        return size == 0 ? 0 : int32_t(left >> (64 - std::min(size, 32u)));
      });
  t["bfi.b32"] = each<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t at, uint32_t size) {
        const uint32_t mask = uint32_t(((uint64_t(1) << std::min(size, 32u)) - 1) << at);
        return at > 31 ? b : (b & ~mask) | (a << at & mask);
      });
  t["lop3.b32"] = each<uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>(
      [](uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
        uint32_t out = 0;
        for (int i = 0; i < 8; ++i)
          if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        return out;
      });
}

// Exact where the device approximates (ex2, lg2, rcp, …): it is right to two units in the last place.
inline void floats(Table& t) {
  binary<float>(t, "add", [](float a, float b) { return a + b; });
  binary<float>(t, "sub", [](float a, float b) { return a - b; });
  binary<float>(t, "mul", [](float a, float b) { return a * b; });
  binary<float>(t, "div", [](float a, float b) { return a / b; });
  binary<float>(t, "max", [](float a, float b) { return a != a || b > a ? b : a; });
  binary<float>(t, "min", [](float a, float b) { return a != a || b < a ? b : a; });
  binary<float>(t, "max.NaN", [](float a, float b) { return a != a || a > b ? a : b; });
  binary<float>(t, "min.NaN", [](float a, float b) { return a != a || a < b ? a : b; });
  t["fma.f32"] = each<float, float, float, float>(
      [](float a, float b, float c) { return float(double(a) * b + c); });
  t["selp.f32"] = t["selp.b32"];
  unary<float>(t, "neg", [](float a) { return -a; });
  unary<float>(t, "abs", [](float a) { return std::fabs(a); });
  for (const char* type : {"f16", "bf16"}) {
    t[std::string("neg.") + type] =
        each<uint16_t, uint16_t>([](uint16_t a) { return uint16_t(a ^ 0x8000); });
    t[std::string("abs.") + type] =
        each<uint16_t, uint16_t>([](uint16_t a) { return uint16_t(a & 0x7FFF); });
  }
  unary<float>(t, "ex2", [](float a) { return std::exp2(a); });
  unary<float>(t, "lg2", [](float a) { return std::log2(a); });
  unary<float>(t, "rcp", [](float a) { return 1 / a; });
  unary<float>(t, "sqrt", [](float a) { return std::sqrt(a); });
  unary<float>(t, "rsqrt", [](float a) { return 1 / std::sqrt(a); });
  unary<float>(t, "tanh", [](float a) { return std::tanh(a); });
}

template <class T>
bool nan(T a, T b) {
  return a != a || b != b;
}

// What is compared of a register.
template <class T>
T number(T x) {
  return x;
}
inline float number(F16 x) { return wide(x); }
inline float number(BF16 x) { return wide(x); }

template <class T>
void comparisons(Table& t, const std::string& type) {
  auto add = [&]<class F>(const char* name, F) {
    t[name + ("." + type)] = each<bool, T, T>([](T a, T b) { return F()(number(a), number(b)); });
  };
  add("setp.eq", [](auto a, auto b) { return a == b; });
  add("setp.ne", [](auto a, auto b) { return !nan(a, b) && a != b; });
  add("setp.lt", [](auto a, auto b) { return a < b; });
  add("setp.le", [](auto a, auto b) { return a <= b; });
  add("setp.gt", [](auto a, auto b) { return a > b; });
  add("setp.ge", [](auto a, auto b) { return a >= b; });
  if constexpr (std::is_same_v<decltype(number(T())), float>) {
    add("setp.equ", [](auto a, auto b) { return nan(a, b) || a == b; });
    add("setp.neu", [](auto a, auto b) { return a != b; });
    add("setp.ltu", [](auto a, auto b) { return !(a >= b); });
    add("setp.leu", [](auto a, auto b) { return !(a > b); });
    add("setp.gtu", [](auto a, auto b) { return !(a <= b); });
    add("setp.geu", [](auto a, auto b) { return !(a < b); });
    add("setp.num", [](auto a, auto b) { return !nan(a, b); });
    add("setp.nan", [](auto a, auto b) { return nan(a, b); });
  }
}

inline void comparisons(Table& t) {
  comparisons<float>(t, "f32");
  comparisons<F16>(t, "f16"), comparisons<BF16>(t, "bf16");
  comparisons<uint16_t>(t, "b16"), comparisons<uint32_t>(t, "b32");
  comparisons<uint64_t>(t, "b64");
  comparisons<uint16_t>(t, "u16"), comparisons<uint32_t>(t, "u32");
  comparisons<uint64_t>(t, "u64");
  comparisons<int16_t>(t, "s16"), comparisons<int32_t>(t, "s32"), comparisons<int64_t>(t, "s64");
}

// Of a float to the nearest integer, held to what D can say.
template <class D>
D integer(float x) {
  if (x != x) return 0;
  const double most = double(std::numeric_limits<D>::max()), least = std::numeric_limits<D>::min();
  return x >= most ? std::numeric_limits<D>::max() : x <= least ? D(least) : D(x);
}

// cvt.TO.FROM of integers. A byte lies in a register of two: S is what the register holds.
template <class S, class Value>
void from_integer(Table& t) {
  const std::string from = "." + name_of<Value>();
  auto add = [&]<class D>(const std::string& to, D) {
    t["cvt." + to + from] = each<D, S>([](S x) { return D(Value(x)); });
  };
  add("u16", uint16_t()), add("u32", uint32_t()), add("u64", uint64_t());
  add("s16", int16_t()), add("s32", int32_t()), add("s64", int64_t());
  add("f32", float());
  t["cvt.u8" + from] = each<uint16_t, S>([](S x) { return uint16_t(uint8_t(x)); });
  t["cvt.s8" + from] = each<int16_t, S>([](S x) { return int16_t(int8_t(x)); });
}

template <class T>
void from_small(Table& t, const std::string& name) {
  t["cvt.f32." + name] = each<float, T>([](T x) { return wide(x); });
  t["cvt." + name + ".f32"] = each<T, float>([](float x) { return narrow<T>(x); });
  t["cvt." + name + "x2.f32"] = each<uint32_t, float, float>([](float high, float low) {
    return uint32_t(narrow<T>(high).bits) << 16 | narrow<T>(low).bits;
  });
}

template <class D>
void from_float(Table& t) {
  const std::string to = "." + name_of<D>() + ".f32";
  t["cvt.rzi" + to] = each<D, float>([](float x) { return integer<D>(std::trunc(x)); });
  t["cvt.rni" + to] = each<D, float>([](float x) { return integer<D>(std::nearbyint(x)); });
  t["cvt.rmi" + to] = each<D, float>([](float x) { return integer<D>(std::floor(x)); });
  t["cvt.rpi" + to] = each<D, float>([](float x) { return integer<D>(std::ceil(x)); });
}

inline void conversions(Table& t) {
  from_integer<uint16_t, uint8_t>(t), from_integer<uint16_t, int8_t>(t);
  from_integer<uint16_t, uint16_t>(t), from_integer<int16_t, int16_t>(t);
  from_integer<uint32_t, uint32_t>(t), from_integer<int32_t, int32_t>(t);
  from_integer<uint64_t, uint64_t>(t), from_integer<int64_t, int64_t>(t);
  from_small<BF16>(t, "bf16"), from_small<F16>(t, "f16");
  from_float<int32_t>(t), from_float<uint32_t>(t), from_float<int64_t>(t);
  t["cvt.rna.tf32.f32"] = each<uint32_t, float>([](float x) { return rounded_tf32(x); });
}

}  // namespace ptx
