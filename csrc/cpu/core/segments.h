// Attention by a state that is a sum over tokens, cut for the threads: what linear.cpp and
// performer.cpp share.
//
// Work is cut into (b, h) and, when there are too few of those for the threads, into segments of the
// sequence: their states are summed first, each is given what it starts from, and then every segment
// runs on its own. A packed batch is cut into (sequence, h) in the same way (packed.h): a Problem is a
// dense batch, or one sequence of a packed one.
#pragma once

#include <algorithm>
#include <vector>

#include "packed.h"
#include "task.h"

namespace tab {

/// Tokens above which the sum over a segment, tile by tile, is compensated: some 500 to 1000
/// additions of equal terms stay within 4e-5, and cost nothing.
constexpr int64_t LONG = int64_t{1} << 15;

struct Segmented : Attention {
  int64_t group = 1;  // heads of q that share one of k, v and the states; h counts the latter
  int64_t states;     // B, or of how many packed sequences there are states
  int64_t tile, segments, length;  // tokens in a tile; segments of a sequence, tokens in each
  bool causal, compensated;        // compensated: sums keep what additions round away
  double eps;

  /// Counts heads, once q and k are known.
  void share(const Inputs& in) { h = in.k.size(1), group = h > 0 ? in.q.size(1) / h : 1; }
  /// Once the sizes are known. `rows`: how many (b, h), or (sequence, h), run side by side.
  void cut(int64_t tokens, int64_t rows) {
    tile = tokens;
    const int64_t tiles = std::max<int64_t>(ceiling(n, tile), 1);
    length = ceiling(tiles, tab::segments(rows, tiles)) * tile;
    segments = std::max<int64_t>(ceiling(n, length), 1);
    compensated = length * group > LONG;
  }
};

/// The arguments of the steps over keys, out of those of the steps over queries, which are complete
/// but for this: where there are more or fewer keys, the mask is one of keys alone.
template <class Args>
Args over_keys(Args& a, int64_t n) {
  Args keys = a;
  if (n == a.n) return keys;
  keys.n = n, keys.cut(a.tile, a.b * a.h);
  a.mask = nullptr;
  return keys;
}

/// The steps over queries of one problem, and those over its keys.
template <class Args>
struct Problem {
  Args a, kv;
};

/// A dense batch with `keys` keys as one problem, or a packed batch of T elements as many.
/// move(x, from): what `x` has beside the rows of tokens is that of the tokens from there on.
template <class T, class Args, class Move>
std::vector<Problem<Args>> problems(Args& a, int64_t keys, const Ends& ends, const Move& move) {
  if (!ends.packed) {
    const Args kv = over_keys(a, keys);
    return {{a, kv}};
  }
  // Side by side, or, where they are too few for the threads, each in segments.
  const int64_t all = ends.count() * a.h;
  const int64_t rows = segments(all, ceiling(a.n, a.tile)) == 1 ? all : a.h;
  std::vector<Problem<Args>> each;
  each.reserve(ends.count());
  a.compensated = false;
  for (int64_t i = 0; i < ends.count(); ++i) {
    Args x = sequence<T>(a, ends.at[i], ends.at[i + 1]);
    x.cut(a.tile, rows);
    a.compensated = a.compensated || x.compensated;  // for the scratch
    move(x, ends.at[i]);
    each.push_back({x, x});
  }
  return each;
}

/// Whether nobody's tokens are cut into segments.
template <class Args>
bool whole(const std::vector<Problem<Args>>& each) {
  return std::all_of(each.begin(), each.end(), [](const Problem<Args>& x) {
    return x.a.segments == 1 && x.kv.segments == 1;
  });
}

/// f(problem, head, slot) for every (b, h) or (sequence, h), side by side; the slot is the place of
/// its state among all.
template <class Args, class F>
void each_head(const std::vector<Problem<Args>>& each, const F& f) {
  if (each.empty()) return;
  const int64_t heads = each[0].a.b * each[0].a.h;
  parallel(heads * static_cast<int64_t>(each.size()),
           [&](int64_t slot) { f(each[slot / heads], slot % heads, slot); });
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
/// keys to a state; `outputs` reads it and, causal, takes it along.
template <class A, class Args, class States, class Given, class Step>
void attend(const std::vector<Problem<Args>>& each, const States& states, int64_t work,
            const Tensor& like, Step keys, Step outputs, const Given& first, const Given& last) {
  if (whole(each))
    return each_head(each, [&](const Problem<Args>& x, int64_t head, int64_t slot) {
      Arena<A> scratch = arena<A>(work + Arena<A>::cost(states.size));
      A* state = scratch.take(states.size);
      states.read(state, first, slot);
      if (!x.a.causal) keys(x.kv, head, state, scratch.next);
      outputs(x.a, head, state, scratch.next);
      states.write(state, last, slot);
    });
  int64_t slot = 0;  // of the first head
  for (const auto& [a, kv] : each) {
    const SegmentStates<A, States> sums(kv, states, work, like);
    sums.sum(kv, keys);
    sums.scan(
        false, [&](A* x, int64_t head) { states.read(x, first, slot + head); },
        [&](A* x, int64_t head) { states.write(x, last, slot + head); });
    sums.run(a, outputs);
    slot += a.b * a.h;
  }
}

}  // namespace tab
