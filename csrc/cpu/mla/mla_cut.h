// How the work of multi-head latent attention is cut into tasks (mla.cpp). Included after each_isa.h.
#pragma once

#include <algorithm>

#include "../core/task.h"
#include "mla.h"

namespace tab {

/// How many parts of the batch, of the heads and of the queries; `each` is the size of one part.
struct Cut {
  struct Axis {
    int64_t size, each, parts;
    Axis(int64_t size, int64_t parts, int64_t whole = 1)
        : size(size),
          each(ceiling(ceiling(size, parts), whole) * whole),
          parts(ceiling(size, each)) {}
    int64_t from(int64_t part) const { return part * each; }
    int64_t to(int64_t part) const { return std::min(size, (part + 1) * each); }
  };
  Axis batch, heads, queries;

  int64_t tasks() const { return batch.parts * heads.parts * queries.parts; }
  int64_t query_part(int64_t task) const { return task % queries.parts; }
  int64_t head_part(int64_t task) const { return task / queries.parts % heads.parts; }
  int64_t batch_part(int64_t task) const { return task / queries.parts / heads.parts; }
  MlaTask operator[](int64_t task) const {
    const int64_t b = batch_part(task), h = head_part(task), q = query_part(task);
    return {batch.from(b), batch.to(b), heads.from(h), heads.to(h), queries.from(q), queries.to(q)};
  }
};

/// Enough tasks for the threads: first by batch, then by heads, then by blocks of queries. `count`
/// problems like this one run side by side.
inline Cut cut_forward(const Mla& a, int64_t count) {
  const int64_t all = count * a.b,
                enough = all % threads() == 0 ? a.b : ceiling(4 * threads(), count);
  const Cut::Axis batch(a.b, a.b), heads(a.h, std::min(a.h, ceiling(enough, a.b)));
  const int64_t left = ceiling(enough, batch.parts * heads.parts);
  return {batch, heads, Cut::Axis(a.n, std::min(left, ceiling(a.n, 64)), a.rows)};
}

/// At most 64 tasks, whose sums take at most 64 MiB (or four times the smallest possible).
inline Cut cut_backward(const Mla& a, int64_t latent, int64_t weights, int64_t count) {
  constexpr int64_t enough = 64;
  const int64_t room = (int64_t(1) << 24) / count;
  const int64_t latents = std::max<int64_t>(4, room / latent);
  const int64_t weight_sums = std::max<int64_t>(4, room / weights);
  const Cut::Axis batch(a.b, std::min({a.b, enough, weight_sums}));
  const Cut::Axis heads(a.h, std::min({a.h, ceiling(enough, batch.parts), latents}));
  const int64_t left = std::min({enough / (batch.parts * heads.parts), latents / heads.parts,
                                 weight_sums / batch.parts, ceiling(a.n, 128)});
  return {batch, heads, Cut::Axis(a.n, std::max<int64_t>(1, left), a.rows)};
}

/// The same problem undivided.
inline Cut undivided(const Mla& a) {
  return {Cut::Axis(a.b, 1), Cut::Axis(a.h, 1), Cut::Axis(a.n, 1, a.rows)};
}

}  // namespace tab
