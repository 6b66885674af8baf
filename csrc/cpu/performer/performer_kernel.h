// FAVOR+ attention, the steps of the forward pass (formulas: performer.cpp), and the table of all
// steps. Included once per instruction set.

#include "performer_features.h"

namespace tab::TAB_ISA {

/// state += the keys of the segment.
template <class T>
static void keys(const Performer& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  Arena<A> arena{static_cast<A*>(scratch)};
  const auto t = State<A>::sum(state, s.mp, s.ep, a.compensated, arena);
  A *k = arena.take(a.tile * s.dp), *v = arena.take(a.tile * s.ep), *x = arena.take(a.tile * P<A>);
  A *off = arena.take(a.tile), *one = arena.take(a.tile);
  for (int64_t i = 0; i < a.tile; ++i) one[i] = 1;
  for (int64_t i = s.from; i < s.to; i += a.tile) {
    const int64_t count = S::count(s, i);
    S::load_keys(s, i, count, k, v, off);
    absorb(s, count, k, off, v, one, t, x);
  }
}

/// A row of outputs out of its sum and denominator, and its log-sum-exp at shift r.
template <class T, class A = acc_t<T>>
TAB_INLINE void finish(const Segment<T>& s, int64_t i, const A* sum, A den, A r) {
  den += static_cast<A>(s.a.eps);
  const bool nothing = den == 0;
  store_row(Segment<T>::row(s, s.a.o, i), s.a.e, sum, nothing ? A(0) : 1 / den);
  *Segment<T>::lse_of(s, i) = nothing ? INF<A> : r + static_cast<A>(__builtin_log(den));
}

/// o and lse over the segment, bidirectional.
template <class T>
static void outputs(const Performer& a, int64_t task, void* state, void* scratch) {
  using A = acc_t<T>;
  using S = Segment<T>;
  const auto s = S::at(a, task);
  const auto t = State<A>::at(state, s.mp, s.ep);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *q = arena.take(a.tile * s.dp), *o = arena.take(a.tile * s.ep), *x = arena.take(a.tile * s.mp);
  A *den = arena.take(a.tile * W<A>), *top = arena.take(a.tile * W<A>), *r = arena.take(a.tile);
  for (int64_t head = 0; head < a.group; ++head) {
    const auto sq = S::of_queries(s, head);
    for (int64_t i = s.from; i < s.to; i += a.tile) {
      const int64_t count = S::count(s, i);
      S::load(sq, a.q, i, count, a.d, q);
      for (int64_t j = 0; j < count * W<A>; ++j) top[j] = -INF<A>, den[j] = 0;
      for (int64_t p = 0; p < s.mp / P<A>; ++p) {
        A* y = x + p * P<A> * a.tile;
        exponents(s, p, count, q, y);
        const Vec<A> c0 = load(t.c + p * P<A>), c1 = load(t.c + p * P<A> + W<A>);
        for (int64_t j = 0; j < count; ++j, y += P<A>)
          store(top + j * W<A>,
                maximum<A>(maximum<A>(load(y) + c0, load(y + W<A>) + c1), load(top + j * W<A>)));
      }
      for (int64_t j = 0; j < count; ++j) {
        r[j] = a.kernel == 0 ? highest<A>(load(top + j * W<A>)) : A(0);
        r[j] = r[j] == -INF<A> ? A(0) : r[j];
      }
      for (int64_t p = 0; p < s.mp / P<A>; ++p) {
        A* y = x + p * P<A> * a.tile;
        const Vec<A> c[2] = {load(t.c + p * P<A>), load(t.c + p * P<A> + W<A>)};
        features(a.kernel, count, y, c, r);
        const Vec<A> z0 = load(t.z + p * P<A>), z1 = load(t.z + p * P<A> + W<A>);
        for (int64_t j = 0; j < count; ++j)
          store(den + j * W<A>,
                load(den + j * W<A>) + load(y + j * P<A>) * z0 + load(y + j * P<A> + W<A>) * z1);
        gemm(count, s.ep, P<A>, y, P<A>, t.s + p * P<A> * s.ep, s.ep, o, s.ep, p != 0);
      }
      for (int64_t j = 0; j < count; ++j)
        finish(sq, i + j, o + j * s.ep, sum<A>(load(den + j * W<A>)), r[j]);
    }
  }
}

}  // namespace tab::TAB_ISA

#include "performer_backward.h"
#include "performer_causal.h"
#include "performer_causal_backward.h"

namespace tab::TAB_ISA {

template <class T>
constexpr PerformerKernels performer_kernels = {
    W<acc_t<T>>,  pack<acc_t<T>>,    keys<T>,  outputs<T>,        queries<T>,
    gradients<T>, causal_outputs<T>, reads<T>, causal_queries<T>, causal_gradients<T>};

}  // namespace tab::TAB_ISA
