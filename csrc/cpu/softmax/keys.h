// Where a strip finds the rows of K and V, and what it asks for on the way. Included once per
// instruction set, by softmax_kernel.h.

namespace tab::TAB_ISA {

/// The keys of one (b, head of k and v) and, a chunk at a time, where their rows are.
template <class T>
struct Keys {
  using A = acc_t<T>;
  const Softmax& a;
  int64_t b, h;
  A *k, *v;  // copies of the chunk's rows, padded; unused when they are read in place
  Stretch* stretch;
  Ahead& ahead;  // what comes next
  int64_t stretches = 0, size = 0;

  static constexpr int64_t cost(int64_t chunk, int64_t dp, int64_t ep) {
    return Arena<A>::cost(chunk * dp) + Arena<A>::cost(chunk * ep);
  }
  /// Takes the next runs that fit a chunk; returns the run behind them.
  TAB_INLINE const Run* next(Keys& s, const Run* run, const Run* end) {
    s.stretches = s.size = 0;
    for (; run < end && (s.size == 0 || s.size + run->count <= s.a.chunk); ++run) {
      Stretch* last = s.stretches > 0 ? s.stretch + s.stretches - 1 : nullptr;
      if (last != nullptr && last->first + last->count == run->first)
        last->count += run->count;
      else
        s.stretch[s.stretches++] = {s.size, run->first, run->count};
      s.size += run->count;
    }
    if (s.a.copy)
      for (int64_t i = 0; i < s.stretches; ++i) {
        const Stretch& x = s.stretch[i];
        load_rows<T>(row<T>(s.a.k, s.b, s.h, x.first), s.a.k.n, x.count, s.a.d,
                     s.k + x.at * padded<A>(s.a.d));
        load_rows<T>(row<T>(s.a.v, s.b, s.h, x.first), s.a.v.n, x.count, s.a.e,
                     s.v + x.at * padded<A>(s.a.e));
      }
    return run;
  }
  TAB_INLINE const A* rows(const Rows& x, const A* copy, int64_t width, const Keys& s,
                           const Stretch& t, int64_t& step) {
    if constexpr (sizeof(T) == sizeof(A))
      if (!s.a.copy) {
        step = x.n;
        return reinterpret_cast<const A*>(row<T>(x, s.b, s.h, t.first));
      }
    step = padded<A>(width);
    return copy + t.at * step;
  }
};

/// Lines of what comes next that are asked for beside each tile of a product.
constexpr int64_t LINES = TAB_VECTOR_BYTES / 2;

/// The next head of this thread, if it is small and this task a whole one: it is done before the
/// hardware knows where the next one lies, and would wait for memory three tenths of its time
/// (AVX-512: four tenths). A head that is not small finds its own rows, and would not stay in the L2.
template <class T>
TAB_INLINE Ahead next_head(const Softmax& a, const Part& part, bool backward) {
  Ahead x;
  const int64_t head = part.head + a.workers, bytes = (a.n + a.m) * (a.d + a.e) * sizeof(T);
  const bool whole = a.group == 1 && part.last - part.first == a.strips;
  if (!whole || bytes >= int64_t{1} << 18 || head >= a.b * a.h) return x;
  const int64_t b = head / a.h, h = head % a.h;
  Ahead::add(x, row<T>(a.q, b, h, 0), a.q.n, a.n, a.d);
  if (backward) {
    Ahead::add(x, row<T>(a.grad, b, h, 0), a.grad.n, a.n, a.e);
    Ahead::add(x, row<T>(a.o, b, h, 0), a.o.n, a.n, a.e);
  }
  Ahead::add(x, row<T>(a.k, b, h, 0), a.k.n, a.m, a.d);
  Ahead::add(x, row<T>(a.v, b, h, 0), a.v.n, a.m, a.e);
  if (backward) {  // where its sums begin
    Ahead::add(x, row<T>(a.dk, b, h, 0), a.dk.n, a.m, a.d);
    Ahead::add(x, row<T>(a.dv, b, h, 0), a.dv.n, a.m, a.e);
  }
  return x;
}

/// `a` with the keys [from, to), which are all that the part sees, copied side by side if that pays.
template <class T, class Args>
TAB_INLINE Args bring_together(const Args& a, const Part& part, int64_t queries, int64_t from,
                               int64_t to, Arena<acc_t<T>>& arena) {
  using A = acc_t<T>;
  Args x = a;
  const int64_t strips = ceiling(part.last - part.first, part.step), count = to - from;
  if (count <= 0 || count > keys_together(a, strips * queries, sizeof(T))) return x;
  if constexpr (sizeof(T) == sizeof(A)) {
    const int64_t b = part.head / a.kv, h = part.head % a.kv;
    A *k = arena.take(count * a.d), *v = arena.take(count * a.e);
    load_rows<T>(row<T>(a.k, b, h, from), a.k.n, count, a.d, k);
    load_rows<T>(row<T>(a.v, b, h, from), a.v.n, count, a.e, v);
    x.k.data = k - from * a.d, x.k.b = x.k.h = 0, x.k.n = a.d;
    x.v.data = v - from * a.e, x.v.b = x.v.h = 0, x.v.n = a.e;
  }
  return x;
}

}  // namespace tab::TAB_ISA
