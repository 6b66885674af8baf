// Rows of tensors, and scratch rows padded to whole vectors with zeros (padded<A>(n)). Included by
// one_isa.h, after simd.h.

namespace tab::TAB_ISA {

// --- between tensors and scratch ------------------------------------------------------------------

/// Asks for n elements of a tensor's row that will be loaded soon: the rows of a token-major tensor
/// lie too far apart for the hardware to guess. Any address is allowed.
template <class T>
TAB_INLINE void prefetch_row(const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += 64 / sizeof(T)) __builtin_prefetch(x + i);
}
constexpr int64_t AHEAD = 16;  // rows between the one being loaded and the one asked for

/// Rows that will be read after what is done now, asked for a few at a time beside it: asked for at
/// once they would fill every buffer for lines on their way, and what is done now would wait, too.
struct Ahead {
  struct Piece {
    const char* row;
    int64_t step, rows, bytes;
  } piece[8];
  int64_t first = 0, end = 0;

  template <class T>
  TAB_INLINE void add(Ahead& x, const T* row, int64_t step, int64_t rows, int64_t width) {
    if (rows == 0) return;
    const int64_t size = sizeof(T);
    x.piece[x.end++] = {reinterpret_cast<const char*>(row), step * size, rows, width * size};
  }
  TAB_INLINE bool done(const Ahead& x) { return x.first == x.end; }
  static TAB_OUTLINE void more(Ahead& x, int64_t lines) {
    while (lines > 0 && !done(x)) {
      Piece& p = x.piece[x.first];
      for (int64_t i = 0; i < p.bytes; i += 64, --lines) __builtin_prefetch(p.row + i, 0, 2);
      p.row += p.step;
      if (--p.rows == 0) ++x.first;
    }
  }
  /// At least `lines` more of the lines of 64 bytes, into the L2.
  TAB_INLINE void ask(Ahead& x, int64_t lines) {
    if (__builtin_expect(!done(x), false)) more(x, lines);
  }
};

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

/// The same, past the caches if `past`.
template <class T>
TAB_INLINE void write_row(T* x, int64_t n, const acc_t<T>* row, acc_t<T> scale, bool past) {
  using A = acc_t<T>;
  if (!past) return store_row(x, n, row, scale);
  int64_t i = 0;
  for (; i + W<A> <= n; i += W<A>) stream(x + i, load(row + i) * scale);
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
  for (int64_t i = 0; i < count; ++i) {
    prefetch_row(x + (i + AHEAD) * step, width);
    load_row(x + i * step, width, y + i * padded<acc_t<T>>(width));
  }
}

// --- whole padded rows ----------------------------------------------------------------------------

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

}  // namespace tab::TAB_ISA
