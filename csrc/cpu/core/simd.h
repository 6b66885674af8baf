// Vectors of one instruction set: loads and stores that convert, exp. Included by each_isa.h, once
// per instruction set, so it has no include guard. A is float or double, T any element type.

namespace tab::TAB_ISA {

template <class A>
struct vector {
  typedef A type __attribute__((vector_size(TAB_VECTOR_BYTES)));
};
template <class A>
using Vec = typename vector<A>::type;
/// Lanes in a vector of A.
template <class A>
constexpr int64_t W = TAB_VECTOR_BYTES / sizeof(A);
/// n rounded up to whole vectors: the row length of scratch matrices.
template <class A>
constexpr int64_t padded(int64_t n) {
  return (n + W<A> - 1) / W<A> * W<A>;
}

// The integer vector with the lanes of Vec<A>, and the 16-bit one with the lanes of Vec<float>.
template <class A>
struct integer {
  typedef int32_t scalar;
  typedef int32_t type __attribute__((vector_size(TAB_VECTOR_BYTES)));
};
template <>
struct integer<double> {
  typedef int64_t scalar;
  typedef int64_t type __attribute__((vector_size(TAB_VECTOR_BYTES)));
};
template <class A>
using Int = typename integer<A>::type;
typedef uint32_t Bits __attribute__((vector_size(TAB_VECTOR_BYTES)));
typedef uint16_t Short __attribute__((vector_size(TAB_VECTOR_BYTES / 2)));

template <class A>
TAB_INLINE Vec<A> splat(A x) {
  return x - Vec<A>{};
}
template <class To, class From>
TAB_INLINE To as(From x) {
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

// --- loads and stores -----------------------------------------------------------------------------

TAB_INLINE Vec<float> load(const float* p) {
  Vec<float> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
TAB_INLINE Vec<double> load(const double* p) {
  Vec<double> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}
TAB_INLINE Vec<float> load(const bf16* p) {
  Short x;
  __builtin_memcpy(&x, p, sizeof x);
  return as<Vec<float>>(__builtin_convertvector(x, Bits) << 16);
}
TAB_INLINE Vec<float> load(const fp16* p) {
  Short x;
  __builtin_memcpy(&x, p, sizeof x);
  const Bits bits = __builtin_convertvector(x, Bits), magnitude = bits & 0x7fff;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal.
  Bits y = as<Bits>(as<Vec<float>>(magnitude << 13) * 0x1p112f);
  y |= (Bits)(magnitude >= 0x7c00) & 0x7f800000;  // infinity and NaN
  return as<Vec<float>>(y | (bits & 0x8000) << 16);
}

TAB_INLINE void store(float* p, Vec<float> x) { __builtin_memcpy(p, &x, sizeof x); }
TAB_INLINE void store(double* p, Vec<double> x) { __builtin_memcpy(p, &x, sizeof x); }
TAB_INLINE void store(bf16* p, Vec<float> x) {
  const Bits bits = as<Bits>(x);
  Bits y = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // nearest, ties to even
  y = x == x ? y : 0x7fc0 - Bits{};
  const Short s = __builtin_convertvector(y, Short);
  __builtin_memcpy(p, &s, sizeof s);
}
TAB_INLINE void store(fp16* p, Vec<float> x) {
  const Bits bits = as<Bits>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  // Normal results: round 13 bits away, nearest with ties to even, and move the bias.
  Bits y = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  // Subnormal results: adding 0.5 lets the float adder align and round them.
  const Bits tiny = as<Bits>(as<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  y = magnitude < (113u << 23) ? tiny : y;
  y = magnitude >= 0x477ff000 ? 0x7c00 - Bits{} : y;  // 65520 and above round to infinity
  y = magnitude > 0x7f800000 ? 0x7e00 - Bits{} : y;
  const Short s = __builtin_convertvector(y | sign, Short);
  __builtin_memcpy(p, &s, sizeof s);
}

/// store, but past the caches where the type and the address allow it: the line is not read first,
/// and evicts nothing. Other threads see it after `fence`.
template <class T>
TAB_INLINE void stream(T* p, Vec<acc_t<T>> x) {
#if defined(__SSE2__)
  if constexpr (sizeof(T) == 4)
    if (reinterpret_cast<uintptr_t>(p) % TAB_VECTOR_BYTES == 0) {
#if TAB_VECTOR_BYTES == 64
      __builtin_ia32_movntps512(p, x);
#elif TAB_VECTOR_BYTES == 32
      __builtin_ia32_movntps256(p, x);
#else
      __builtin_ia32_movntps(p, x);
#endif
      return;
    }
#endif
  store(p, x);
}
TAB_INLINE void fence() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

/// The first n < W lanes; the others load as 0.
template <class T>
TAB_INLINE Vec<acc_t<T>> load_part(const T* p, int64_t n) {
  T lanes[W<acc_t<T>>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
template <class T>
TAB_INLINE void store_part(T* p, Vec<acc_t<T>> x, int64_t n) {
  T lanes[W<acc_t<T>>];
  store(lanes, x);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

/// Asks for n elements of a tensor's row that will be loaded soon: the rows of a token-major tensor
/// lie too far apart for the hardware to guess. Any address is allowed.
template <class T>
TAB_INLINE void prefetch_row(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(x + i);
}
constexpr int64_t AHEAD = 16;  // rows between the one being loaded and the one asked for

/// n elements of a tensor into a scratch row, its padding zeroed.
template <class T>
TAB_INLINE void load_row(const T* x, int64_t n, acc_t<T>* row) {
  constexpr int64_t w = W<acc_t<T>>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(row + i, load(x + i));
  if (i < n) store(row + i, load_part(x + i, n - i));
}
/// scale·row into n elements of a tensor.
template <class T>
TAB_INLINE void store_row(T* x, int64_t n, const acc_t<T>* row, acc_t<T> scale) {
  constexpr int64_t w = W<acc_t<T>>;
  int64_t i = 0;
  for (; i + w <= n; i += w) store(x + i, load(row + i) * scale);
  if (i < n) store_part(x + i, load(row + i) * scale, n - i);
}

/// Row (b, h, t) of a tensor.
template <class T>
TAB_INLINE T* row(const Rows& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.b + h * x.h + t * x.n;
}
template <class T>
static bool all_zero(const T* x, int64_t n) {
  bool zero = true;
  for (int64_t i = 0; i < n; ++i)
    if constexpr (sizeof(T) == 2)
      zero = zero && (x[i].bits & 0x7fff) == 0;
    else
      zero = zero && x[i] == 0;
  return zero;
}
/// y (count, padded width) = rows of a tensor that lie `step` apart.
template <class T>
static void load_rows(const T* x, int64_t step, int64_t count, int64_t width, acc_t<T>* y) {
  for (int64_t i = 0; i < count; ++i)
    load_row(x + i * step, width, y + i * padded<acc_t<T>>(width));
}

// --- whole padded rows ----------------------------------------------------------------------------

/// 0, 1, 2, …: the numbers of the lanes.
template <class A>
TAB_INLINE Int<A> lanes() {
  static constexpr typename integer<A>::scalar all[16] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                          8, 9, 10, 11, 12, 13, 14, 15};
  Int<A> x;
  __builtin_memcpy(&x, all, sizeof x);
  return x;
}
/// The sum over the lanes by halves: log W additions one after the other, not W.
template <class A>
TAB_INLINE A sum(Vec<A> x) {
#pragma GCC unroll 4
  for (int half = W<A> / 2; half > 0; half /= 2) x += __builtin_shuffle(x, lanes<A>() ^ half);
  return x[0];
}
/// x and y with the lanes `half` apart added: sums of x where (lane & half) is 0, else of y.
template <class A>
TAB_INLINE Vec<A> fold(Vec<A> x, Vec<A> y, int half) {
  constexpr typename integer<A>::scalar width = W<A>;
  const Int<A> lane = lanes<A>(), of_y = (lane & half) != 0 ? Int<A>{} + width : Int<A>{};
  return __builtin_shuffle(x, y, lane + of_y) + __builtin_shuffle(x, y, (lane ^ half) + of_y);
}
/// The sums over the lanes of four vectors, in lanes 0 to 3: half the shuffles of four times `sum`.
template <class A>
TAB_INLINE Vec<A> four_sums(const Vec<A> (&x)[4]) {
  Vec<A> s = fold<A>(fold<A>(x[0], x[1], 1), fold<A>(x[2], x[3], 1), 2);
#pragma GCC unroll 4
  for (int half = 4; half < W<A>; half *= 2) s += __builtin_shuffle(s, lanes<A>() ^ half);
  return s;
}
/// Lanes 0 to 3 from and to memory.
template <class A>
TAB_INLINE Vec<A> load_four(const A* p) {
  Vec<A> x{};
  __builtin_memcpy(&x, p, 4 * sizeof(A));
  return x;
}
template <class A>
TAB_INLINE void store_four(A* p, Vec<A> x) {
  __builtin_memcpy(p, &x, 4 * sizeof(A));
}
/// y where either is NaN: one instruction. What must not lose a NaN comes second.
template <class A>
TAB_INLINE Vec<A> maximum(Vec<A> x, Vec<A> y) {
  return x > y ? x : y;
}
/// The largest of the lanes.
template <class A>
TAB_INLINE A highest(Vec<A> x) {
#pragma GCC unroll 4
  for (int half = W<A> / 2; half > 0; half /= 2)
    x = maximum<A>(x, __builtin_shuffle(x, lanes<A>() ^ half));
  return x[0];
}
/// x *= factor over n padded elements.
template <class A>
TAB_INLINE void multiply(A* x, A factor, int64_t n) {
  for (int64_t i = 0; i < n; i += W<A>) store(x + i, load(x + i) * factor);
}
/// Σ_i x_i y_i over n padded elements.
template <class A>
TAB_INLINE A dot(const A* x, const A* y, int64_t n) {
  Vec<A> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * W<A> <= n; i += 2 * W<A>) {
    even += load(x + i) * load(y + i);
    odd += load(x + i + W<A>) * load(y + i + W<A>);
  }
  if (i < n) even += load(x + i) * load(y + i);
  return sum<A>(even + odd);
}
/// y += a·x over n padded elements.
template <class A>
TAB_INLINE void add_scaled(A* y, A a, const A* x, int64_t n) {
  for (int64_t i = 0; i < n; i += W<A>) store(y + i, load(y + i) + load(x + i) * a);
}
template <class A>
TAB_INLINE void clear(A* x, int64_t n) {
  __builtin_memset(x, 0, n * sizeof(A));
}
/// x += y over one vector. `low`, unless null, holds what earlier additions rounded away (Kahan
/// 1965): thousands of equal terms would else all be rounded the same way.
template <class A>
TAB_INLINE void add_to(A* x, Vec<A> y, A* low) {
  const Vec<A> before = load(x);
  if (low == nullptr) return store(x, before + y);
  y -= load(low);
  const Vec<A> after = before + y;
  store(low, (after - before) - y);
  store(x, after);
}
/// Whether n padded elements are all finite: 0·NaN and 0·∞ are NaN.
template <class A>
TAB_INLINE bool all_finite(const A* x, int64_t n) {
  Vec<A> even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * W<A> <= n; i += 2 * W<A>) {
    even += load(x + i) * A(0);
    odd += load(x + i + W<A>) * A(0);
  }
  if (i < n) even += load(x + i) * A(0);
  return sum<A>(even + odd) == 0;
}

// --- exp ------------------------------------------------------------------------------------------

/// max(x, low), NaN where x is: one instruction, where the comparison and choice are two.
template <class A>
TAB_INLINE Vec<A> at_least(Vec<A> x, A low) {
#if TAB_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4)
    return __builtin_ia32_maxps512_mask(splat<A>(low), x, x, -1, 4);
#elif TAB_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) return __builtin_ia32_maxps256(splat<A>(low), x);
#endif
  return x < low ? splat<A>(low) : x;
}

/// exp(x) = 2^n·exp(r) with n = round(x/ln 2), |r| ≤ ln 2 / 2, for x up to 88 (double: 709).
/// exp(r) is a polynomial: degree 6, minimax, for float; Taylor of degree 13 for double.
/// The scale goes on in two halves, or by AVX-512's instruction for it, so that subnormal results
/// come out right. NaN gives NaN. Within 1.6 units of the last place of exp, 2.5 for double
/// (tests/ops/test_simd.py).
template <class A>
TAB_INLINE Vec<A> exp(Vec<A> x) {
  constexpr bool single = sizeof(A) == 4;
  constexpr A magic = single ? A(0x1.8p23) : A(0x1.8p52);  // adding it rounds to an integer
  constexpr A ln2_high = single ? A(0x1.62e4p-1) : A(0x1.62e42fefa38p-1);
  constexpr A ln2_low = single ? A(0x1.7f7d1cp-20) : A(0x1.ef35793c7673p-45);
  x = at_least<A>(x, single ? A(-104) : A(-746));
  const Vec<A> shifted = x * A(1.4426950408889634) + magic, n = shifted - magic;
  const Vec<A> r = (x - n * ln2_high) - n * ln2_low;
  Vec<A> y;
  if constexpr (single) {
    y = splat<A>(0x1.6d75363351e56p-10f);
    y = y * r + 0x1.123d86e1f311cp-7f;
    y = y * r + 0x1.5554acdbfbdc3p-5f;
    y = y * r + 0x1.55547ca8485cdp-3f;
    y = y * r + 0x1.000000287bc68p-1f;
    y = y * r + 0x1.0000002e48681p+0f;
  } else {
    double inverse = 1.0 / 6227020800;  // 1/13!
    y = splat<A>(inverse);
    for (int i = 13; i >= 2; --i) y = y * r + (inverse *= i);
  }
  y = y * r + A(1);
#if TAB_VECTOR_BYTES == 64
  constexpr int rounding = 4;  // as the machine is set
  if constexpr (single)
    return __builtin_ia32_scalefps512_mask(y, n, y, -1, rounding);
  else
    return __builtin_ia32_scalefpd512_mask(y, n, y, -1, rounding);
#else
  constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
  const Int<A> power = as<Int<A>>(shifted) - as<Int<A>>(splat<A>(magic)), half = power >> 1;
  return y * as<Vec<A>>((half + bias) << mantissa) *
         as<Vec<A>>((power - half + bias) << mantissa);
#endif
}

/// 2^x for x ≤ 0 by a polynomial in x - round(x): degree 6, minimax, for float (at most 0.6 units
/// of the last place), Taylor of degree 13 for double. It is 0 at and below 2^-127 (2^-1023), so
/// that masked scores of -∞ vanish; NaN gives NaN, whatever its bits: the power of two is a factor,
/// since added to the exponent bits of a NaN it could make them a number.
template <class A>
TAB_INLINE Vec<A> exp2(Vec<A> x) {
  constexpr bool single = sizeof(A) == 4;
  constexpr A low = single ? A(-127) : A(-1023);
  constexpr A magic = (single ? A(0x1.8p23) : A(0x1.8p52)) - low;  // with the exponent's bias
  x = x < low ? splat<A>(low) : x;
  const Vec<A> shifted = x + magic, r = x - (shifted - magic);
  Vec<A> y;
  if constexpr (single) {
    y = splat<A>(0x1.44400395d945cp-13f);
    y = y * r + 0x1.5f0896ef8d38fp-10f;
    y = y * r + 0x1.3b2a1b6c92d5fp-7f;
    y = y * r + 0x1.c6af6cce0b480p-5f;
    y = y * r + 0x1.ebfbe045f9936p-3f;
    y = y * r + 0x1.62e4302fcd000p-1f;
  } else {
    constexpr double ln2 = 0.6931471805599453;
    double term = 1, terms[14];
    for (int i = 1; i <= 13; ++i) terms[i] = term *= ln2 / i;
    y = splat<A>(terms[13]);
    for (int i = 12; i >= 1; --i) y = y * r + terms[i];
  }
  y = y * r + A(1);
  constexpr int mantissa = single ? 23 : 52;
  return y * as<Vec<A>>(as<Int<A>>(shifted) << mantissa);
}

template <class A>
TAB_INLINE A log2(A x) {
  if constexpr (sizeof(A) == 4)
    return __builtin_log2f(x);
  else
    return __builtin_log2(x);
}

/// -∞ -> 0, so that -∞ - x is -∞ and never NaN.
template <class A>
TAB_INLINE Vec<A> finite(Vec<A> x) {
  return x == splat<A>(-__builtin_inf()) ? Vec<A>{} : x;
}

}  // namespace tab::TAB_ISA
