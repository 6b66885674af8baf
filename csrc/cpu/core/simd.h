// Vectors of one instruction set: loads and stores that convert, sums and maxima over the lanes.
// Included by one_isa.h. A is float or double, T any element type.

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
  return up(n, W<A>);
}

TAB_INLINE int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

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
#if defined(__clang__)
      __builtin_nontemporal_store(x, reinterpret_cast<Vec<float>*>(p));
#elif TAB_VECTOR_BYTES == 64
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

// --- across the lanes -----------------------------------------------------------------------------

/// 0, 1, 2, …: the numbers of the lanes.
template <class A>
TAB_INLINE Int<A> lanes() {
  static constexpr
      typename integer<A>::scalar all[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Int<A> x;
  __builtin_memcpy(&x, all, sizeof x);
  return x;
}
/// x with the lanes `half` apart exchanged.
template <int half, class V, int... I>
TAB_INLINE V exchanged(V x, std::integer_sequence<int, I...>) {
  return TAB_SHUFFLE(x, x, (I ^ half)...);
}
template <class A, int half>
TAB_INLINE Vec<A> exchanged(Vec<A> x) {
  return exchanged<half>(x, std::make_integer_sequence<int, W<A>>{});
}
/// The sum over the lanes by halves: log W additions one after the other, not W.
template <class A, int half = W<A> / 2>
TAB_INLINE A sum(Vec<A> x) {
  if constexpr (half == 0)
    return x[0];
  else
    return sum<A, half / 2>(x + exchanged<A, half>(x));
}
/// x and y with the lanes `half` apart added: sums of x where (lane & half) is 0, else of y.
template <int half, class V, int... I>
TAB_INLINE V fold(V x, V y, std::integer_sequence<int, I...>) {
  constexpr int width = sizeof...(I);
  return TAB_SHUFFLE(x, y, (I + (I & half ? width : 0))...) +
         TAB_SHUFFLE(x, y, ((I ^ half) + (I & half ? width : 0))...);
}
template <class A, int half>
TAB_INLINE Vec<A> fold(Vec<A> x, Vec<A> y) {
  return fold<half>(x, y, std::make_integer_sequence<int, W<A>>{});
}
/// Every lane with the sum of those that are a multiple of `half` apart from it.
template <class A, int half>
TAB_INLINE Vec<A> sums_apart(Vec<A> x) {
  if constexpr (half < W<A>)
    return sums_apart<A, 2 * half>(x + exchanged<A, half>(x));
  else
    return x;
}
/// The sums over the lanes of four vectors, in lanes 0 to 3: half the shuffles of four times `sum`.
template <class A>
TAB_INLINE Vec<A> four_sums(const Vec<A> (&x)[4]) {
  return sums_apart<A, 4>(fold<A, 2>(fold<A, 1>(x[0], x[1]), fold<A, 1>(x[2], x[3])));
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
template <class A, int half = W<A> / 2>
TAB_INLINE A highest(Vec<A> x) {
  if constexpr (half == 0)
    return x[0];
  else
    return highest<A, half / 2>(maximum<A>(x, exchanged<A, half>(x)));
}

}  // namespace tab::TAB_ISA
