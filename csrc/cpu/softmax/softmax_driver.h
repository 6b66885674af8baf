// How local.cpp and sparse.cpp run their strips: checks, outputs, threads, memory. Included after
// each_isa.h.
//
// Forward, a task is some neighbouring strips. Backward, a task is one (b, head of k and v) or, when
// there are too few of those for the threads, a segment of its strips, with sums of dK and dV of its
// own that are added up in order at the end: no atomics, and the same bits in every run. The heads of
// q that share one of k and v are one list of strips, so k and v are read in place.
#pragma once

#include <algorithm>
#include <vector>

#include "../core/task.h"
#include "../core/types.h"
#include "softmax.h"

namespace tab {

/// do, o and lse of a backward pass, checked, pointed to by `a`, and kept alive.
struct Cotangents {
  Tensor grad, o, lse;

  Cotangents(const char* op, Softmax& a, const Tensor& grad_, const Tensor& q, const Tensor& o_,
             const Tensor& lse_)
      : grad(unit_last(grad_)), o(unit_last(o_)), lse(torch::stable::contiguous(lse_)) {
    check_output(op, "do", grad, q, a.e);
    check_output(op, "o", o, q, a.e);
    check_lse(op, "lse", lse, q);
    a.grad = Rows(grad), a.o = Rows(o), a.lse = lse.data_ptr();
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
    a.m = in.k.size(2), a.shift = a.m - a.n;
    a.scale = scale, a.softcap = softcap, a.slopes = slopes ? slopes->data_ptr() : nullptr;
  }
};

/// How much is held at once. `most_runs`: pieces that a strip's list of keys can have, unmasked.
template <class T>
void prepare(Softmax& a, int64_t lanes, int64_t queries, int64_t most_runs, const Inputs& in) {
  a.runs = most_runs + (a.mask != nullptr ? a.m / 16 : 0);
  a.kv = in.k.size(1), a.group = a.kv > 0 ? a.h / a.kv : 1, a.strips = ceiling(a.n, queries);
  a.copy = !std::is_same_v<T, acc_t<T>> || a.d % lanes != 0 || a.e % lanes != 0;
  // Scores, and K and V when they are copied, fit the L2 together.
  a.chunk = std::clamp<int64_t>(65536 / (a.d + a.e) / 8 * 8, 64, 512);
}

/// Scratch of one strip, in elements: every piece that the kernels take.
inline int64_t softmax_scratch(const Softmax& a, int64_t lanes, int64_t queries) {
  using P = Arena<float>;
  const int64_t dp = up(a.d, lanes), ep = up(a.e, lanes);
  return P::cost(a.d * queries) + P::cost(a.e * queries) + 2 * P::cost(queries * dp) +
         2 * P::cost(queries * ep) + 3 * P::cost(a.chunk * queries) + P::cost(a.chunk * dp) +
         P::cost(a.chunk * ep);
}

template <class T, class Args>
std::tuple<Tensor, Tensor> softmax_forward(Args& a, const SoftmaxKernels<Args>& kernels,
                                           int64_t most_runs, const Inputs& in) {
  prepare<T>(a, kernels.lanes, kernels.forward, most_runs, in);
  const Tensor o = token_major(in.v, a.b, a.h, a.n, a.e);
  const Tensor lse = torch::stable::new_empty(in.q, {a.b, a.h, a.n}, accumulator(in.q));
  a.o = Rows(o), a.lse = lse.data_ptr();
  const int64_t heads = a.b * a.kv, strips = a.group * a.strips;
  const int64_t work = softmax_scratch(a, kernels.lanes, kernels.forward);
  const int64_t few = std::clamp<int64_t>(heads * strips / (8 * threads()), 1, 16);
  const int64_t tasks = ceiling(strips, few);
  parallel(heads * tasks, [&](int64_t task) {
    // First, last, second, …: BigBird's long rows are at both ends and must not come last.
    const int64_t t = task % tasks, g = t % 2 == 0 ? t / 2 : tasks - 1 - t / 2;
    const Part part{task / tasks, g * few, std::min((g + 1) * few, strips), 1};
    kernels.strips(a, part, nullptr, arena<Run>(2 * a.runs).next, arena<Stretch>(a.runs).next,
                   arena<acc_t<T>>(work).next);
  });
  return {o, lse};
}

/// keys(i0, i1) are the bounds of the keys that the queries i0 … i1 see. `deal`: strips go to the
/// segments in turns, since they differ in length; else a segment is one stretch of them.
template <class T, class Args, class Bounds>
std::tuple<Tensor, Tensor, Tensor> softmax_backward(Args& a, const SoftmaxKernels<Args>& kernels,
                                                    int64_t most_runs, bool deal,
                                                    const Bounds& keys, const Inputs& in) {
  using A = acc_t<T>;
  const int64_t lanes = kernels.lanes, queries = kernels.backward;
  prepare<T>(a, lanes, queries, most_runs, in);
  const Gradients out(a, in);
  const int64_t strips = a.group * a.strips;
  const int64_t heads = a.b * a.kv, work = softmax_scratch(a, lanes, queries);
  const int64_t dp = up(a.d, lanes), ep = up(a.e, lanes);
  const int64_t length = ceiling(strips, segments(heads, strips)), count = ceiling(strips, length);
  const auto run = [&](const Part& part, const Sums& sums, A* scratch) {
    kernels.strips(a, part, &sums, arena<Run>(2 * a.runs).next, arena<Stretch>(a.runs).next,
                   scratch);
  };

  if (count == 1) {
    // In the outputs the rows of a head lie H·D apart. Where that is a power of two they share a few
    // sets of the caches, which then hold few of them. So the sums stand side by side in scratch and
    // are stored once, unless they are few or very many.
    const bool apart = a.copy || (a.m > 128 && a.m * (dp + ep) <= int64_t{1} << 20);
    const int64_t rows = apart ? a.m * (dp + ep) : 0;
    parallel(heads, [&](int64_t head) {
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
    });
    return {out.dq, out.dk, out.dv};
  }

  std::vector<Sums> parts(heads * count);
  int64_t size = 0;
  for (int64_t task = 0; task < heads * count; ++task) {
    const int64_t begin = task % count * length, last = std::min(begin + length, strips) - 1;
    const int64_t i0 = begin % a.strips * queries, i1 = (last % a.strips + 1) * queries;
    const bool all = deal || begin / a.strips != last / a.strips;  // or of two heads
    const auto [from, to] = all ? std::pair<int64_t, int64_t>(0, a.m) : keys(i0, std::min(i1, a.n));
    parts[task] = {nullptr, nullptr, dp, ep, from, to};
    size += (to - from) * (dp + ep);
  }
  Tensor buffer = empty(in.q, {size}, accumulator(in.q));
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
  return {out.dq, out.dk, out.dv};
}

}  // namespace tab
