// Attention by a state that is a sum over tokens, cut for the threads: what linear.cpp and
// performer.cpp share.
//
// Work is cut into (b, h) and, when there are too few of those for the threads, into segments of the
// sequence: their states are summed first, each is given what it starts from, and then every segment
// runs on its own.
#pragma once

#include <algorithm>

#include "attention.h"
#include "task.h"

namespace tab {

/// Tokens above which the sum over a segment, tile by tile, is compensated: some 500 to 1000
/// additions of equal terms stay within 4e-5, and cost nothing.
constexpr int64_t LONG = int64_t{1} << 15;

struct Segmented : Attention {
  int64_t tile, segments, length;  // tokens in a tile; segments of a sequence, tokens in each
  bool causal, compensated;        // compensated: sums keep what additions round away
  double eps;

  /// Once the sizes are known.
  void cut(int64_t tokens) {
    tile = tokens;
    const int64_t tiles = std::max<int64_t>(ceiling(n, tile), 1);
    length = ceiling(tiles, tab::segments(b * h, tiles)) * tile;
    segments = std::max<int64_t>(ceiling(n, length), 1);
    compensated = length > LONG;
  }
};

/// The arguments of the steps over keys, out of those of the steps over queries, which are complete
/// but for this: where there are more or fewer keys, the mask is one of keys alone.
template <class Args>
Args over_keys(Args& a, int64_t n) {
  Args keys = a;
  if (n == a.n) return keys;
  keys.n = n, keys.cut(a.tile);
  a.mask = nullptr;
  return keys;
}

/// Whether a tensor is so large that little of it is still cached when somebody reads it.
inline bool large(const Tensor& x) { return x.numel() >= int64_t{1} << 21; }

/// The states of all segments in one buffer. `States` says how one lies in memory: its size, clear(x),
/// and advance(carry, x), by which carry becomes carry + x, and x what carry was.
template <class A, class States>
struct SegmentStates {
  const Segmented& a;
  const States& states;
  int64_t work;  // scratch of a step
  Tensor buffer;

  SegmentStates(const Segmented& a, const States& states, int64_t work, const Tensor& like)
      : a(a),
        states(states),
        work(work),
        buffer(torch::stable::new_empty(like, {a.b * a.h * a.segments * states.size},
                                        accumulator(like))) {}

  A* of(int64_t task) const { return static_cast<A*>(buffer.data_ptr()) + task * states.size; }

  /// f(task, scratch) for every segment.
  template <class F>
  void each(const F& f) const {
    parallel(a.b * a.h * a.segments, [&](int64_t task) { f(task, arena<A>(work).next); });
  }
  /// The sum of each segment's own tokens.
  template <class Args, class Step>
  void sum(const Args& args, Step step) const {
    each([&](int64_t task, A* scratch) {
      states.clear(of(task));
      step(args, task, of(task), scratch);
    });
  }
  /// Sums of segments -> what each has to start from: causal, the sum of those before it (in the
  /// `reverse`, behind it), else of all, which stands in the first slot of the head.
  /// before(x, head) sets x to the state before the tokens, after(x, head) takes that after them.
  template <class Before, class After>
  void scan(bool reverse, const Before& before, const After& after) const {
    parallel(a.b * a.h, [&](int64_t head) {
      A* carry = arena<A>(states.size).next;
      before(carry, head);
      for (int64_t i = 0; i < a.segments; ++i)
        states.advance(carry, of(head * a.segments + (reverse ? a.segments - 1 - i : i)));
      if (!a.causal) std::copy_n(carry, states.size, of(head * a.segments));
      after(carry, head);
    });
  }
  /// A step of every segment of `args` from what it has to start from.
  template <class Args, class Step>
  void run(const Args& args, Step step) const {
    parallel(args.b * args.h * args.segments, [&](int64_t task) {
      A* from = of(a.causal ? task : task / args.segments * a.segments);
      step(args, task, from, arena<A>(work).next);
    });
  }
};

/// The forward pass: the outputs, from the state `first` of each head to `last`. The step `keys` adds
/// keys to a state, with the arguments kv; `outputs` reads it and, causal, takes it along.
template <class A, class Args, class States, class Given, class Step>
void attend(const Args& a, const Args& kv, const States& states, int64_t work, const Tensor& like,
            Step keys, Step outputs, const Given& first, const Given& last) {
  const auto before = [&](A* x, int64_t head) { states.read(x, first, head); };
  const auto after = [&](A* x, int64_t head) { states.write(x, last, head); };
  if (a.segments == 1 && kv.segments == 1)
    return parallel(a.b * a.h, [&](int64_t head) {
      Arena<A> scratch = arena<A>(work + Arena<A>::cost(states.size));
      A* state = scratch.take(states.size);
      before(state, head);
      if (!a.causal) keys(kv, head, state, scratch.next);
      outputs(a, head, state, scratch.next);
      after(state, head);
    });
  const SegmentStates<A, States> sums(kv, states, work, like);
  sums.sum(kv, keys);
  sums.scan(false, before, after);
  sums.run(a, outputs);
}

}  // namespace tab
