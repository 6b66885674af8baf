// What a call may ask for between the product and the softmax: a cap, ALiBi's slopes, a key mask.
// Included once per instruction set, by softmax_kernel.h.
//
//     s_ij = c·tanh(x_ij/c) - m_h·|p_i - j|,  x_ij = scale·q_iᵀk_j;  -∞ where key j is masked
//
// p_i = i + shift is where query i stands among the keys.
//
// It is a pass of its own over scores that lie in the L2, and costs nothing where it is not asked for.
// Long stretches of masked keys are not even listed.

namespace tab::TAB_ISA {

constexpr int64_t GAP = 16;  // masked keys in a row that are left out of the list

TAB_INLINE bool adjusts(const Softmax& a) {
  return a.softcap > 0 || a.slopes != nullptr || a.mask != nullptr;
}

TAB_INLINE bool masked(const Softmax& a, int64_t b, int64_t token) {
  return a.mask != nullptr && !a.mask[b * a.m + token];
}

/// What the scores of the product are multiplied with: log₂e·scale, or scale/c for a cap.
template <class A>
TAB_INLINE A product_scale(const Softmax& a) {
  return a.softcap > 0 ? A(a.scale / a.softcap) : A(a.scale) * LOG2E<A>;
}

/// The runs of batch entry b without long stretches of masked keys; at most one more for every GAP
/// of keys.
TAB_INLINE int64_t leave_out_masked(const Softmax& a, int64_t b, const Run* run, const Run* end,
                                    Run* to) {
  const uint8_t* real = a.mask + b * a.m;
  int64_t count = 0;
  for (; run < end; ++run) {
    const int64_t stop = run->first + run->count;
    for (int64_t j = run->first;;) {
      while (j < stop && !real[j]) ++j;
      if (j == stop) break;
      const int64_t first = j;
      int64_t last = j;  // real key
      for (; j < stop && j - last <= GAP; ++j)
        if (real[j]) last = j;
      to[count++] = {first, last + 1 - first, run->rows};
    }
  }
  return count;
}

/// s (keys, Q), rows ld apart, times log₂e, from the product. Backward: ds, the products do·v, becomes
/// 0 where the key is masked, and `steep` gets ds/dx = 1 - tanh² where there is a cap.
template <class A>
static void adjust(const Softmax& a, int64_t b, int64_t h, int64_t i0, const Stretch* t,
                   const Stretch* end, int64_t ld, A* s, A* ds, A* steep) {
  typedef typename integer<A>::scalar I;
  const bool bends = a.softcap > 0 || a.slopes != nullptr;
  const A cap = A(a.softcap) * LOG2E<A>;
  const A slope = a.slopes ? static_cast<const A*>(a.slopes)[h] * LOG2E<A> : A(0);
  for (; t < end; ++t)
    for (int64_t r = 0; r < t->count; ++r) {
      const int64_t j = t->first + r, at = (t->at + r) * ld;
      const bool hidden = masked(a, b, j);
      if (!hidden && !bends) continue;
      for (int64_t lane = 0; lane < Q<A>; lane += W<A>) {
        A* place = s + at + lane;
        Vec<A> x = load(place);
        if (a.softcap > 0) {
          x = tanh<A>(x);
          if (steep) store(steep + at + lane, A(1) - x * x);
          x *= cap;
        }
        if (a.slopes) {
          const auto step =
              __builtin_convertvector(lanes<A>() + I(i0 + a.shift + lane - j), Vec<A>);
          x -= slope * maximum<A>(step, -step);
        }
        store(place, hidden ? splat<A>(-__builtin_inf()) : x);
        if (hidden && ds) store(ds + at + lane, Vec<A>{});
      }
    }
}

/// ds∘steep; a pair that does not see each other, 0, stays 0.
template <class A>
static void flatten(int64_t keys, int64_t ld, const A* steep, A* ds) {
  for (const A* end = ds + keys * ld; ds < end; ds += ld, steep += ld)
    for (int64_t i = 0; i < Q<A>; i += W<A>) {
      const Vec<A> x = load(ds + i);
      store(ds + i, x == 0 ? x : x * load(steep + i));
    }
}

/// q of masked tokens that hold what is not finite becomes 0: the gradients of all keys would meet it.
/// Where there are more or fewer queries than keys, the mask is none of theirs.
template <class A>
static void quiet_queries(const Softmax& a, int64_t b, int64_t i0, int64_t count, int64_t width,
                          A* q) {
  if (a.n != a.m) return;
  for (int64_t i = 0; i < count; ++i, q += width)
    if (masked(a, b, i0 + i) && !all_finite(q, width)) clear(q, width);
}

}  // namespace tab::TAB_ISA
