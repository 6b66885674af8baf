// What linear's kernels are given (linear.cpp).
#pragma once

#include "../core/segments.h"

namespace tab {

struct Linear : Segmented {
  int map;      // φ: 0 elu + 1, 1 relu, 2 identity
  bool stream;  // outputs too large for the caches are written past them
  void* notes;  // (B, heads of q, 2, N): 1/den and r, causal backward only
};

struct LinearKernels {
  int64_t lanes;
  void (*keys)(const Linear&, int64_t task, void* state, void* scratch);
  void (*outputs)(const Linear&, int64_t task, void* state, void* scratch);
  void (*queries)(const Linear&, int64_t task, void* state, void* dstate, void* scratch);
  void (*gradients)(const Linear&, int64_t task, void* dstate, void* scratch);
};

}  // namespace tab
