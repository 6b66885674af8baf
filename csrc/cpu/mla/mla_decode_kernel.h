// Decoding with multi-head latent attention, the arithmetic (formulas and steps: mla_decode.cpp).
// Included once per instruction set.
//
// Scores are kept transposed, Sᵀ (keys, heads): then the cache is read where it lies, as the left
// side of Sᵀ = [c k_r]·[q̃ q_r]ᵀ and as the right side of Z = (Sᵀ)ᵀ·c, and softmax runs down the
// columns, with a maximum and a sum for every lane.

namespace tab::TAB_ISA {

constexpr int64_t KEYS = 64, DEPTH = 256;  // keys in a tile; numbers of a key multiplied in one go

template <class A>
struct DecodeSizes {
  int64_t rp, dvp, dnp, hp, width, wide;  // width R+Dr, wide padded

  TAB_INLINE DecodeSizes of(const Decode& a) {
    const int64_t width = a.r + a.dr;
    return {padded<A>(a.r), padded<A>(a.dv), padded<A>(a.dn),
            padded<A>(a.h), width,           padded<A>(width)};
  }
};

/// Scratch of each step, in elements.
template <class A>
static DecodeScratch decode_scratch(const Decode& a) {
  const auto s = DecodeSizes<A>::of(a);
  const auto cost = Arena<A>::cost;
  return {cost(a.b * s.dnp) + cost(KEYS * s.rp) + cost(a.b * s.rp),
          cost(s.width * s.hp) + cost(KEYS * s.hp) + cost(KEYS * s.wide) + 3 * cost(s.hp),
          cost(a.b * s.rp) + cost(s.rp) + cost(a.b * s.dvp)};
}

/// scale·log₂e·[W_ukᵀq_n | q_r] of one head and all sequences, into a.q (B, H, wide + W).
template <class T>
static void absorb(const Decode& a, int64_t head, void* scratch) {
  using A = acc_t<T>;
  const auto s = DecodeSizes<A>::of(a);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *qn = arena.take(a.b * s.dnp), *w = arena.take(KEYS * s.rp), *q = arena.take(a.b * s.rp);
  load_rows<T>(row<T>(a.qn, 0, head, 0), a.qn.b, a.b, a.dn, qn);
  for (int64_t d = 0; d < a.dn; d += KEYS) {
    const int64_t count = least(KEYS, a.dn - d);
    load_rows<T>(row<T>(a.uk, 0, head, d), a.uk.n, count, a.r, w);
    gemm(a.b, s.rp, count, qn + d, s.dnp, w, s.rp, q, s.rp, d > 0);
  }
  for (int64_t b = 0; b < a.b; ++b) {
    A* to = static_cast<A*>(a.q) + (b * a.h + head) * (s.wide + W<A>);
    __builtin_memcpy(to, q + b * s.rp, s.rp * sizeof(A));
    if (a.dr > 0) load_row(row<T>(a.qr, b, head, 0), a.dr, to + a.r);
    multiply(to, A(a.scale) * LOG2E<A>, s.wide);
  }
}

/// p = 2^(s - top) in place, `top` and `total` brought up to date. Returns in `factor` what sums
/// under the old maxima are multiplied by, and whether any of that is not 1.
template <class A>
static bool softmax_columns(int64_t count, int64_t hp, A* s, A* top, A* total, A* factor) {
  bool changed = false;
  for (int64_t h = 0; h < hp; h += W<A>) {
    const Vec<A> old = load(top + h);
    Vec<A> high = old, all{};
    for (int64_t j = 0; j < count; ++j) high = maximum<A>(high, load(s + j * hp + h));
    const Vec<A> shift = finite<A>(high), f = exp2<A>(old - shift);
    for (int64_t j = 0; j < count; ++j) {
      const Vec<A> p = exp2<A>(load(s + j * hp + h) - shift);
      store(s + j * hp + h, p);
      all += p;
    }
    store(top + h, high);
    store(factor + h, f);
    store(total + h, load(total + h) * f + all);
    changed = changed || sum<A>(f) != A(W<A>);
  }
  return changed;
}

/// The keys [from, to) of one sequence: Z (H, Rp) = Σ 2^(s - top) c, with top and total (Hp) behind.
template <class T>
static void split(const Decode& a, const DecodePiece& piece, void* result, void* scratch) {
  using A = acc_t<T>;
  const auto s = DecodeSizes<A>::of(a);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *qt = arena.take(s.width * s.hp), *p = arena.take(KEYS * s.hp);
  A *copy = arena.take(KEYS * s.wide), *factor = arena.take(s.hp);
  A *z = static_cast<A*>(result), *top = z + a.h * s.rp, *total = top + s.hp;
  const int64_t ldq = s.wide + W<A>;
  transpose(a.h, s.width, static_cast<const A*>(a.q) + piece.b * a.h * ldq, ldq, qt, s.hp);
  for (int64_t h = 0; h < s.hp; ++h) top[h] = -__builtin_inf();
  clear(total, s.hp);
  for (int64_t j = piece.from, count; j < piece.to; j += count) {
    const int64_t at = j / a.page, in = j - at * a.page;  // a tile lies in one page
    count = least(least(KEYS, piece.to - j), a.page - in);
    const T* rows = row<T>(a.cache, a.table ? a.table[piece.b * a.pages + at] : piece.b, 0, in);
    const A* keys = copy;
    int64_t ld = s.wide;
    // Whole vectors over the first R numbers must not run past the row.
    if (sizeof(T) == sizeof(A) && s.rp <= s.width)
      keys = reinterpret_cast<const A*>(rows), ld = a.cache.n;
    else
      load_rows<T>(rows, a.cache.n, count, s.width, copy);
    for (int64_t d = 0; d < s.width; d += DEPTH)
      gemm(count, s.hp, least(DEPTH, s.width - d), keys + d, ld, qt + d * s.hp, s.hp, p, s.hp,
           d > 0);
    const bool first = j == piece.from;
    if (softmax_columns(count, s.hp, p, top, total, factor) && !first)
      for (int64_t h = 0; h < a.h; ++h) multiply(z + h * s.rp, factor[h], s.rp);
    gemm<true>(a.h, s.rp, count, p, s.hp, keys, ld, z, s.rp, !first);
  }
}

/// o and lse of one head: the splits of each sequence merged, then W_uv.
template <class T>
static void merge(const Decode& a, int64_t head, const int64_t* first, const void* results,
                  void* scratch) {
  using A = acc_t<T>;
  const auto s = DecodeSizes<A>::of(a);
  Arena<A> arena{static_cast<A*>(scratch)};
  A *z = arena.take(a.b * s.rp), *w = arena.take(s.rp), *o = arena.take(a.b * s.dvp);
  const int64_t size = a.h * s.rp + 2 * s.hp;
  clear(z, a.b * s.rp);
  for (int64_t b = 0; b < a.b; ++b) {
    const A* each = static_cast<const A*>(results);
    A top = -__builtin_inf(), total = 0;
    for (int64_t i = first[b]; i < first[b + 1]; ++i) {
      const A other = each[i * size + a.h * s.rp + head];
      top = other > top ? other : top;
    }
    const Vec<A> shift = finite<A>(splat<A>(top));
    for (int64_t i = first[b]; i < first[b + 1]; ++i) {
      const A* part = each + i * size;
      const A f = exp2<A>(splat<A>(part[a.h * s.rp + head]) - shift)[0];
      total += f * part[a.h * s.rp + s.hp + head];
      add_scaled(z + b * s.rp, f, part + head * s.rp, s.rp);
    }
    multiply(z + b * s.rp, total == 0 ? A(0) : 1 / total, s.rp);
    static_cast<A*>(a.lse)[b * a.h + head] = (top + log2(total)) * LN2<A>;
    for (int64_t i = a.r; i < s.rp; ++i) z[b * s.rp + i] = 0;  // k_r, or what a product left there
  }
  for (int64_t i = 0; i < a.dv; ++i) {
    load_row(row<T>(a.uv, 0, head, i), a.r, w);
    for (int64_t b = 0; b < a.b; ++b) o[b * s.dvp + i] = dot(z + b * s.rp, w, s.rp);
  }
  for (int64_t b = 0; b < a.b; ++b) store_row(row<T>(a.o, b, head, 0), a.dv, o + b * s.dvp, A(1));
}

template <class T>
constexpr DecodeKernels decode_kernels = {W<acc_t<T>>, decode_scratch<acc_t<T>>, absorb<T>,
                                          split<T>, merge<T>};

}  // namespace tab::TAB_ISA
