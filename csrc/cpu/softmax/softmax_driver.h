// How local.cpp and sparse.cpp run their strips: checks, outputs, threads, memory. Included after
// each_isa.h.
//
// Forward, a task is some neighbouring strips. Backward, a task is one (b, head of k and v) or, when
// there are too few of those for the threads, a segment of its strips, with sums of dK and dV of its
// own that are added up in order at the end: no atomics, and the same bits in every run. The heads of
// q that share one of k and v are one list of strips, so k and v are read in place. Of a packed batch
// every sequence is a batch of its own, and the tasks of all run side by side.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/packed.h"
#include "../core/task.h"
#include "../core/types.h"
#include "softmax.h"

namespace tab {

/// do, o and lse of a backward pass, checked, pointed to by `a`, and kept alive.
struct Cotangents {
  Tensor grad, o, lse;
  std::optional<Tensor> dlse;

  Cotangents(const char* op, Softmax& a, const Tensor& grad_, const Tensor& q, const Tensor& o_,
             const Tensor& lse_, const std::optional<Tensor>& dlse_ = {})
      : grad(unit_last(grad_)),
        o(unit_last(o_)),
        lse(torch::stable::contiguous(lse_)),
        dlse(contiguous(dlse_)) {
    check_output(op, "do", grad, q, a.e);
    check_output(op, "o", o, q, a.e);
    check_lse(op, "lse", lse, q);
    if (dlse) check_lse(op, "dlse", *dlse, q);
    a.grad = Rows(grad), a.o = Rows(o), a.lse = lse.data_ptr();
    a.dlse = dlse ? dlse->data_ptr() : nullptr;
  }
};

/// Where the queries stand, and what is done to the scores, checked, pointed to by `a`, kept alive.
struct Rules {
  std::optional<Tensor> slopes;

  Rules(const char* op, Softmax& a, const Inputs& in, const std::optional<Tensor>& slopes_,
        double scale, double softcap)
      : slopes(contiguous(slopes_)) {
    STD_TORCH_CHECK(softcap >= 0, op, ": softcap ≥ 0, 0 for none");
    if (slopes) {
      check_shape(op, "slopes", *slopes, {a.h});
      check_dtype(op, "slopes", *slopes, accumulator(in.q));
    }
    a.m = in.k.size(2), a.shift = a.m - a.n, a.row = a.n;
    a.kv = in.k.size(1), a.group = a.kv > 0 ? a.h / a.kv : 1;
    a.scale = scale, a.softcap = softcap, a.slopes = slopes ? slopes->data_ptr() : nullptr;
  }
};

/// Pieces that a strip's list of keys can have, unmasked.
template <class Args>
using MostRuns = int64_t (*)(const Args&);

/// How much is held at once.
template <class T, class Args>
void prepare(Args& a, int64_t lanes, int64_t queries, MostRuns<Args> most_runs) {
  a.runs = most_runs(a) + (a.mask != nullptr ? a.m / 16 : 0);
  a.strips = ceiling(a.n, queries), a.workers = threads();
  a.copy = !std::is_same_v<T, acc_t<T>> || a.d % lanes != 0 || a.e % lanes != 0;
  // Scores, and K and V when they are copied, fit the L2 together.
  a.chunk = std::clamp<int64_t>(65536 / (a.d + a.e) / 8 * 8, 64, 512);
}

/// A dense batch, or the sequences of a packed one that have tokens, prepared.
template <class T, class Args>
std::vector<Args> problems(const Args& a, int64_t lanes, int64_t queries, MostRuns<Args> most_runs,
                           const Ends& ends) {
  std::vector<Args> each;
  if (!ends.packed) each.push_back(a);
  for (int64_t i = 0; ends.packed && i < ends.count(); ++i) {
    const int64_t from = ends.at[i];
    if (from == ends.at[i + 1]) continue;
    Args x = sequence<T>(a, from, ends.at[i + 1]);
    x.m = x.n;
    x.lse = static_cast<acc_t<T>*>(x.lse) + from;
    if (x.dlse != nullptr) x.dlse = static_cast<const acc_t<T>*>(x.dlse) + from;
    x.enter(i);
    each.push_back(x);
  }
  for (Args& x : each) prepare<T>(x, lanes, queries, most_runs);
  return each;
}

/// Scratch of a part of `strips` strips, in elements: every piece that the kernels take.
inline int64_t softmax_scratch(const Softmax& a, int64_t lanes, int64_t queries, int64_t strips,
                               int64_t bytes) {
  using P = Arena<float>;
  const int64_t together = keys_together(a, strips * queries, bytes);
  const int64_t dp = up(a.d, lanes), ep = up(a.e, lanes);
  return P::cost(a.d * queries) + P::cost(a.e * queries) + 2 * P::cost(queries * dp) +
         2 * P::cost(queries * ep) + 3 * P::cost(a.chunk * queries) + P::cost(a.chunk * dp) +
         P::cost(a.chunk * ep) + P::cost(together * dp) + P::cost(together * ep);
}

template <class T, class Args>
std::tuple<Tensor, Tensor> softmax_forward(Args& a, const SoftmaxKernels<Args>& kernels,
                                           MostRuns<Args> most_runs, const Inputs& in,
                                           const Ends& ends = {}) {
  const Tensor o = token_major(in.v, a.b, a.h, a.n, a.e);
  const Tensor lse = torch::stable::new_empty(in.q, {a.b, a.h, a.n}, accumulator(in.q));
  a.o = Rows(o), a.lse = lse.data_ptr();
  const std::vector<Args> each = problems<T>(a, kernels.lanes, kernels.forward, most_runs, ends);
  const int64_t heads = a.b * a.kv;
  int64_t strips = 0;
  for (const Args& x : each) strips += x.group * x.strips;
  const int64_t few = std::clamp<int64_t>(heads * strips / (8 * threads()), 1, 16);
  std::vector<int64_t> ends_of{0};  // of the tasks of each problem, with a 0 before them
  for (const Args& x : each)
    ends_of.push_back(ends_of.back() + heads * ceiling(x.group * x.strips, few));
  parallel(ends_of.back(), [&](int64_t at) {
    const int64_t i = std::upper_bound(ends_of.begin(), ends_of.end(), at) - ends_of.begin() - 1;
    const Args& x = each[i];
    const int64_t all = x.group * x.strips, tasks = ceiling(all, few), task = at - ends_of[i];
    // First, last, second, …: BigBird's long rows are at both ends and must not come last.
    const int64_t t = task % tasks, g = t % 2 == 0 ? t / 2 : tasks - 1 - t / 2;
    const Part part{task / tasks, g * few, std::min((g + 1) * few, all), 1};
    const int64_t work = softmax_scratch(x, kernels.lanes, kernels.forward, few, sizeof(T));
    kernels.strips(x, part, nullptr, arena<Run>(2 * x.runs).next, arena<Stretch>(x.runs).next,
                   arena<acc_t<T>>(work).next);
  });
  return {o, lse};
}

/// The backward pass of one problem: of a head at once, or of all heads, each in segments.
template <class T, class Args>
struct SoftmaxBackward {
  using A = acc_t<T>;
  const Args& a;
  const SoftmaxKernels<Args>& kernels;
  int64_t dp = up(a.d, kernels.lanes), ep = up(a.e, kernels.lanes);
  int64_t strips = a.group * a.strips;  // of one head of k and v
  int64_t work = softmax_scratch(a, kernels.lanes, kernels.backward, strips, sizeof(T));

  void run(const Part& part, const Sums& sums, A* scratch) const {
    kernels.strips(a, part, &sums, arena<Run>(2 * a.runs).next, arena<Stretch>(a.runs).next,
                   scratch);
  }
  void head(int64_t head) const {
    // In the outputs the rows of a head lie H·D apart. Where that is a power of two they share a few
    // sets of the caches, which then hold few of them. So the sums stand side by side in scratch and
    // are stored once, unless they are few or very many.
    const bool apart = a.copy || (a.m > 128 && a.m * (dp + ep) <= int64_t{1} << 20);
    const int64_t rows = apart ? a.m * (dp + ep) : 0;
    A* scratch = arena<A>(rows + work).next;
    Sums sums{scratch, scratch + a.m * dp, dp, ep, 0, a.m};
    if (!apart) {  // the outputs themselves
      const int64_t b = head / a.kv, h = head % a.kv;
      A* x = static_cast<A*>(a.dk.data) + b * a.dk.b + h * a.dk.h;
      A* y = static_cast<A*>(a.dv.data) + b * a.dv.b + h * a.dv.h;
      sums = {x, y, a.dk.n, a.dv.n, 0, a.m};
    }
    A *x = static_cast<A*>(sums.dk), *y = static_cast<A*>(sums.dv);
    for (int64_t j = 0; j < a.m; ++j) {
      std::fill_n(x + j * sums.ldk, dp, A(0));
      std::fill_n(y + j * sums.ldv, ep, A(0));
    }
    run({head, 0, strips, 1}, sums, scratch + rows);
    if (apart) kernels.finish(a, head, 0, a.m, &sums, 1, scratch + rows);
  }
  /// keys(a, i0, i1) are the bounds of the keys that the queries i0 … i1 see. `deal`: strips go to the
  /// segments in turns, since they differ in length; else a segment is one stretch of them.
  template <class Bounds>
  void in_segments(int64_t segments, bool deal, const Bounds& keys, const Tensor& like) const {
    const int64_t heads = a.b * a.kv, queries = kernels.backward;
    const int64_t length = ceiling(strips, segments), count = ceiling(strips, length);
    std::vector<Sums> parts(heads * count);
    int64_t size = 0;
    for (int64_t task = 0; task < heads * count; ++task) {
      const int64_t begin = task % count * length, last = std::min(begin + length, strips) - 1;
      const int64_t i0 = begin % a.strips * queries, i1 = (last % a.strips + 1) * queries;
      const bool all = deal || begin / a.strips != last / a.strips;  // or of two heads
      const auto [from, to] =
          all ? std::pair<int64_t, int64_t>(0, a.m) : keys(a, i0, std::min(i1, a.n));
      parts[task] = {nullptr, nullptr, dp, ep, from, to};
      size += (to - from) * (dp + ep);
    }
    Tensor buffer = empty(like, {size}, accumulator(like));
    A* next = static_cast<A*>(buffer.data_ptr());
    for (Sums& s : parts) {
      s.dk = next, next += (s.last - s.first) * dp;
      s.dv = next, next += (s.last - s.first) * ep;
    }
    parallel(heads * count, [&](int64_t task) {
      const Sums& sums = parts[task];
      const int64_t s = task % count;
      std::fill_n(static_cast<A*>(sums.dk), (sums.last - sums.first) * (dp + ep), A(0));
      const Part dealt{task / count, s, strips, count};
      const Part block{task / count, s * length, std::min((s + 1) * length, strips), 1};
      run(deal ? dealt : block, sums, arena<A>(work).next);
    });
    constexpr int64_t rows = 256;
    const int64_t blocks = ceiling(a.m, rows);
    parallel(heads * blocks, [&](int64_t task) {
      const int64_t head = task / blocks, j = task % blocks * rows;
      kernels.finish(a, head, j, std::min(j + rows, a.m), &parts[head * count], count,
                     arena<A>(work).next);
    });
  }
};

/// deal, keys: those of SoftmaxBackward::in_segments.
template <class T, class Args, class Bounds>
std::tuple<Tensor, Tensor, Tensor> softmax_backward(Args& a, const SoftmaxKernels<Args>& kernels,
                                                    MostRuns<Args> most_runs, bool deal,
                                                    const Bounds& keys, const Inputs& in,
                                                    const Ends& ends = {}) {
  const Gradients out(a, in);
  const std::vector<Args> each = problems<T>(a, kernels.lanes, kernels.backward, most_runs, ends);
  const int64_t heads = a.b * a.kv, all = heads * static_cast<int64_t>(each.size());
  const auto one = [&](const Args& x) { return SoftmaxBackward<T, Args>{x, kernels}; };
  int64_t strips = 0;
  for (const Args& x : each) strips += one(x).strips;
  if (segments(all, strips) == 1) {
    parallel(all, [&](int64_t task) { one(each[task / heads]).head(task % heads); });
    return {out.dq, out.dk, out.dv};
  }
  for (const Args& x : each) {  // one after the other, as they would be cut by themselves
    const auto pass = one(x);
    if (const int64_t count = segments(heads, pass.strips); count > 1)
      pass.in_segments(count, deal, keys, in.q);
    else
      parallel(heads, [&](int64_t head) { pass.head(head); });
  }
  return {out.dq, out.dk, out.dv};
}

}  // namespace tab
