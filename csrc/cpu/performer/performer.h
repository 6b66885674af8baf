// What performer's kernels are given (performer.cpp).
#pragma once

#include "../core/segments.h"

namespace tab {

struct Performer : Segmented {
  int64_t m;
  int kernel;           // 0 softmax, 1 relu
  double scale, root;   // scale D^(-1/2) and its root
  void *panels, *rows;  // W·D^(-1/4), packed
  void* lse;            // (B, heads of q, N), packed (1, heads of q, T)
  int64_t row;          // of lse: N or T
};

struct PerformerKernels {
  using Step = void (*)(const Performer&, int64_t task, void* state, void* scratch);
  int64_t lanes;
  void (*pack)(const Performer&, const void* projection);
  Step keys, outputs;
  void (*queries)(const Performer&, int64_t task, void* state, void* dstate, void* scratch);
  Step gradients, causal_outputs, reads, causal_queries, causal_gradients;
};

}  // namespace tab
