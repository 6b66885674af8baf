// The hyperbolic tangent of vectors. Included once per instruction set, by the kernels that need it.

namespace tab::TAB_ISA {

/// tanh(x). Below ⅝ an odd function of few terms, which keeps the digits of small x: x + x³·p(x²)
/// with p of degree 4, minimax, for float; for double Lambert's continued fraction
/// x/(1 + x²/(3 + x²/(5 + …))). Above it 1 - 2/(e^2|x| + 1). NaN gives NaN.
template <class A>
TAB_INLINE Vec<A> tanh(Vec<A> x) {
  constexpr bool single = sizeof(A) == 4;
  const Vec<A> z = x * x, size = x < 0 ? -x : x;
  const Vec<A> few = size > A(40) ? splat<A>(A(40)) : size;  // NaN stays
  const Vec<A> far = A(1) - A(2) / (exp<A>(few + few) + A(1));
  Vec<A> near;
  if constexpr (single) {
    near = splat<A>(-0x1.75e1c06556c97p-8f);
    near = near * z + 0x1.522698759c1c8p-6f;
    near = near * z - 0x1.b83c596d75a17p-5f;
    near = near * z + 0x1.110726d0abeb6p-3f;
    near = near * z - 0x1.555532d84ebcep-2f;
    near = near * z * x + x;
  } else {
    near = splat<A>(A(21));
    for (int i = 19; i >= 1; i -= 2) near = z / near + A(i);
    near = x / near;
  }
  return size < A(0.625) ? near : x < 0 ? -far : far;
}

}  // namespace tab::TAB_ISA
