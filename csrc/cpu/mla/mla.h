// Multi-head latent attention, the plain data: what mla.cpp shares with its kernels.
#pragma once

#include "../../common.h"

namespace tab {

struct Mla {
  int64_t b, h, n, dn, dr, r, dv;
  int64_t rows;  // queries whose scores are held at once
  bool causal;
  double scale, softcap;          // softcap 0: none
  const void* slopes;             // (H,) in the accumulation type, or null
  const uint8_t* mask;            // (B, N) or null
  Rows qn, qr, c, kr, uk, uv, o;  // uk and uv: h and n are the head and the row
  Rows grad, dqn, dqr, dc, dkr;   // backward
  void* lse;                      // (B, H, N), packed (1, H, T)
  const void* dlse;               // like it, or null
  int64_t row;                    // of lse: N or T
  void* weights;                  // (H, …), packed: see the kernels
};

/// The batch entries, heads and queries of one task.
struct MlaTask {
  int64_t b0, b1, h0, h1, q0, q1;
  bool add;  // to sums of weights that are there, instead of starting them
};

/// Sums of one task, in the accumulation type: dc and dk_r (B, N, Rp + Drp), null when they go
/// straight into the tensors; dW (H, Dvp + Dn, Rp), rows of W_uv before those of W_uk.
struct MlaSums {
  void *latent, *weights;
};

struct MlaKernels {
  int64_t lanes;
  int64_t (*forward_scratch)(const Mla&);
  int64_t (*backward_scratch)(const Mla&);
  void (*pack_forward)(const Mla&, int64_t head, void* scratch);
  void (*pack_backward)(const Mla&, int64_t head, void* scratch);
  void (*forward)(const Mla&, const MlaTask&, void* peaks, void* scratch);
  void (*backward)(const Mla&, const MlaTask&, const MlaSums&, void* scratch);
  void (*finish_latent)(const Mla&, int64_t token, const void* sums, int64_t count, void* scratch);
  void (*finish_weights)(const Mla&, int64_t head, const void* sums, int64_t count, void* scratch,
                         const Rows& duk, const Rows& duv);
};

}  // namespace tab
