// What the ops on q, k and v have in common: sizes, rows, checks, gradients.
#pragma once

#include "../../common.h"

namespace tab {

struct Attention {
  int64_t b, h, n, d, e;  // e is Dv
  const uint8_t* mask;    // (B, N) or null
  Rows q, k, v, o, grad, dq, dk, dv;
};

/// q, k, v and the mask, checked, as the kernels read them: pointed to by `a`, and kept alive.
struct Inputs {
  Tensor q, k, v;
  std::optional<Tensor> mask;

  Inputs(const char* op, Attention& a, const Tensor& q_, const Tensor& k_, const Tensor& v_,
         const std::optional<Tensor>& mask_ = {}, bool grouped = false, bool cross = false) {
    check_qkv(op, q_, k_, v_, grouped, cross);
    a.b = q_.size(0), a.h = q_.size(1), a.n = q_.size(2), a.d = q_.size(3), a.e = v_.size(3);
    check_mask(op, mask_, a.b, k_.size(2));
    q = unit_last(q_), k = unit_last(k_), v = unit_last(v_), mask = contiguous(mask_);
    a.q = Rows(q), a.k = Rows(k), a.v = Rows(v), a.mask = mask_bytes(mask);
  }
};

/// dq, dk and dv, still empty, pointed to by `a`.
struct Gradients {
  Tensor dq, dk, dv;

  Gradients(Attention& a, const Inputs& in)
      : dq(token_major(in.q, a.b, in.q.size(1), a.n, a.d)),
        dk(token_major(in.k, a.b, in.k.size(1), in.k.size(2), a.d)),
        dv(token_major(in.v, a.b, in.v.size(1), in.v.size(2), a.e)) {
    a.dq = Rows(dq), a.dk = Rows(dk), a.dv = Rows(dv);
  }
};

}  // namespace tab
