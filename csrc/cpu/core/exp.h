// Exponentials and logarithms of vectors. Included by one_isa.h, after simd.h.

namespace tab::TAB_ISA {

template <class A>
constexpr A LOG2E = A(1.4426950408889634);
template <class A>
constexpr A LN2 = A(0.6931471805599453);

/// max(x, low), NaN where x is: one instruction, where the comparison and choice are two.
template <class A>
TAB_INLINE Vec<A> at_least(Vec<A> x, A low) {
#if TAB_VECTOR_BYTES == 64 && defined(__clang__)
  if constexpr (sizeof(A) == 4) return __builtin_ia32_maxps512(splat<A>(low), x, 4);
#elif TAB_VECTOR_BYTES == 64
  if constexpr (sizeof(A) == 4) return __builtin_ia32_maxps512_mask(splat<A>(low), x, x, -1, 4);
#elif TAB_VECTOR_BYTES == 32
  if constexpr (sizeof(A) == 4) return __builtin_ia32_maxps256(splat<A>(low), x);
#endif
  return x < low ? splat<A>(low) : x;
}

/// exp(x) = 2^n·exp(r) with n = round(x/ln 2), |r| ≤ ln 2 / 2, for x up to 88 (double: 709).
/// exp(r) is a polynomial: degree 6, minimax, for float; Taylor of degree 13 for double.
/// The scale goes on in two halves, or by AVX-512's instruction for it, so that subnormal results
/// come out right. With `falling` x ≤ 0 is known, and what comes out for another x is any number:
/// the halves are 2^(n+64), by one shift, and 2^-64, which the coefficients carry. NaN gives NaN.
/// Within 1.6 units of the last place of exp, 2.5 for double (tests/ops/test_simd.py).
template <class A, bool falling = false>
TAB_INLINE Vec<A> exp(Vec<A> x) {
  constexpr bool single = sizeof(A) == 4, shifts = falling && TAB_VECTOR_BYTES != 64;
  constexpr int mantissa = single ? 23 : 52, bias = single ? 127 : 1023;
  constexpr A whole = single ? A(0x1.8p23) : A(0x1.8p52);  // adding it rounds to an integer
  constexpr A magic = whole + (shifts ? A(bias + 64) : A(0)), one = shifts ? A(0x1p-64) : A(1);
  constexpr A ln2_high = single ? A(0x1.62e4p-1) : A(0x1.62e42fefa38p-1);
  constexpr A ln2_low = single ? A(0x1.7f7d1cp-20) : A(0x1.ef35793c7673p-45);
  x = at_least<A>(x, single ? A(-104) : A(-746));
  const Vec<A> shifted = x * LOG2E<A> + magic, n = shifted - magic;
  const Vec<A> r = (x - n * ln2_high) - n * ln2_low;
  Vec<A> y;
  if constexpr (single) {
    y = splat<A>(one * 0x1.6d75363351e56p-10f);
    y = y * r + one * 0x1.123d86e1f311cp-7f;
    y = y * r + one * 0x1.5554acdbfbdc3p-5f;
    y = y * r + one * 0x1.55547ca8485cdp-3f;
    y = y * r + one * 0x1.000000287bc68p-1f;
    y = y * r + one * 0x1.0000002e48681p+0f;
  } else {
    double inverse = one / 6227020800;  // 1/13!
    y = splat<A>(inverse);
    for (int i = 13; i >= 2; --i) y = y * r + (inverse *= i);
  }
  y = y * r + one;
  if constexpr (shifts) return y * as<Vec<A>>(as<Int<A>>(shifted) << mantissa);
#if TAB_VECTOR_BYTES == 64
  constexpr int rounding = 4;  // as the machine is set
  if constexpr (single)
    return __builtin_ia32_scalefps512_mask(y, n, y, -1, rounding);
  else
    return __builtin_ia32_scalefpd512_mask(y, n, y, -1, rounding);
#else
  const Int<A> power = as<Int<A>>(shifted) - as<Int<A>>(splat<A>(magic)), half = power >> 1;
  return y * as<Vec<A>>((half + bias) << mantissa) * as<Vec<A>>((power - half + bias) << mantissa);
#endif
}

/// 2^x for x ≤ 0 by a polynomial in x - round(x): degree 6, minimax, for float (at most 0.6 units
/// of the last place), Taylor of degree 13 for double. It is 0 below 2^-99.5 (2^-969.5), so
/// that masked scores of -∞ vanish, and so that no product with a weight is subnormal, for which
/// Intel's processors take a hundred cycles: weights fall that far under ALiBi's slopes. The power
/// of two is a factor, of which 2^27 (2^53) stands in the coefficients: NaN gives NaN, whatever its
/// bits, where added to the exponent bits of a NaN it could make them a number.
template <class A>
TAB_INLINE Vec<A> exp2(Vec<A> x) {
  constexpr bool single = sizeof(A) == 4;
  constexpr A low = single ? A(-100) : A(-970), one = single ? A(0x1p27) : A(0x1p53);
  constexpr A magic = (single ? A(0x1.8p23) : A(0x1.8p52)) - low;  // the exponent bits of low: 0
  x = at_least<A>(x, low);
  const Vec<A> shifted = x + magic, r = x - (shifted - magic);
  Vec<A> y;
  if constexpr (single) {
    y = splat<A>(one * 0x1.44400395d945cp-13f);
    y = y * r + one * 0x1.5f0896ef8d38fp-10f;
    y = y * r + one * 0x1.3b2a1b6c92d5fp-7f;
    y = y * r + one * 0x1.c6af6cce0b480p-5f;
    y = y * r + one * 0x1.ebfbe045f9936p-3f;
    y = y * r + one * 0x1.62e4302fcd000p-1f;
  } else {
    double term = one, terms[14];
    for (int i = 1; i <= 13; ++i) terms[i] = term *= LN2<double> / i;
    y = splat<A>(terms[13]);
    for (int i = 12; i >= 1; --i) y = y * r + terms[i];
  }
  y = y * r + one;
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
