// tab_cuda::mla_fwd and tab_cuda::mla_bwd: N ≤ 64, one block a (batch, head), one launch; backward
// then sums over heads and batch with two matrix products. The arithmetic is in mla.cuh.
#include <tuple>

#include "../core/launch.h"
#include "mla_backward.cuh"

namespace tab::few {
namespace {

namespace ops = torch::stable;
using Mask = std::optional<Tensor>;

/// A (B, N, R) tensor that all heads share.
template <typename T>
Heads<const T> shared(const Tensor& x) {
  return {static_cast<const T*>(x.data_ptr()), x.stride(0), 0, x.stride(1)};
}

struct Inputs {
  Tensor qn, qr, c, kr, uk, uv;
  Mask mask;
  int64_t b, h, n, dn, dr, r, dv;

  Inputs(const char* op, const Tensor& q_nope, const Tensor& q_rope, const Tensor& c_kv,
         const Tensor& k_rope, const Tensor& w_uk, const Tensor& w_uv, const Mask& key_mask) {
    STD_TORCH_CHECK(q_nope.dim() == 4 && q_rope.dim() == 4 && c_kv.dim() == 3 && w_uv.dim() == 3,
                    op, ": q_nope, q_rope, c_kv and w_uv have 4, 4, 3 and 3 dimensions");
    b = q_nope.size(0), h = q_nope.size(1), n = q_nope.size(2), dn = q_nope.size(3);
    dr = q_rope.size(3), r = c_kv.size(2), dv = w_uv.size(1);
    check_few(op, q_nope);
    check_shape(op, "q_rope", q_rope, {b, h, n, dr});
    check_shape(op, "c_kv", c_kv, {b, n, r});
    check_shape(op, "k_rope", k_rope, {b, n, dr});
    check_shape(op, "w_uk", w_uk, {h, dn, r});
    check_shape(op, "w_uv", w_uv, {h, dv, r});
    const char* names[] = {"q_rope", "c_kv", "k_rope", "w_uk", "w_uv"};
    const Tensor* rest[] = {&q_rope, &c_kv, &k_rope, &w_uk, &w_uv};
    for (int i = 0; i < 5; ++i) check_dtype(op, names[i], *rest[i], q_nope.scalar_type());
    check_mask(op, key_mask, b, n);
    qn = unit_last(q_nope), qr = unit_last(q_rope), c = unit_last(c_kv), kr = unit_last(k_rope);
    uk = ops::contiguous(w_uk), uv = ops::contiguous(w_uv), mask = contiguous(key_mask);
  }

  template <typename T>
  Latents<T> read(double scale, bool causal) const {
    Sees sees{};
    sees.n = static_cast<int>(n), sees.left = sees.right = sees.n, sees.causal = causal;
    sees.mask = mask_bytes(mask);
    return {static_cast<int>(h),
            static_cast<int>(dn),
            static_cast<int>(dr),
            static_cast<int>(r),
            static_cast<int>(dv),
            static_cast<float>(scale),
            sees,
            heads<const T>(qn),
            heads<const T>(qr),
            shared<T>(c),
            shared<T>(kr),
            static_cast<const T*>(uk.data_ptr()),
            static_cast<const T*>(uv.data_ptr())};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q_nope, Tensor q_rope, Tensor c_kv, Tensor k_rope,
                                           Tensor w_uk, Tensor w_uv, Mask key_mask, double scale,
                                           bool causal) {
  const char* op = "tab_cuda::mla_fwd";
  const ops::accelerator::DeviceGuard guard(q_nope.get_device_index());
  const Inputs x(op, q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask);
  Tensor o = token_major(x.qn, x.b, x.h, x.n, x.dv);
  Tensor lse = states(x.qn, {x.b, x.h, x.n}), peak = states(x.qn, {x.b, x.h});
  with_type(op, x.qn, [&](auto type) {
    using T = decltype(type);
    const MlaForward<T> problem{x.read<T>(scale, causal), heads<T>(o),
                                static_cast<float*>(lse.data_ptr()),
                                static_cast<float*>(peak.data_ptr())};
    launch(op, problem, problem.BYTES, x.qn);
  });
  return {o, lse, peak};
}

/// [W_uk | W_uv] of each head: (H, Dn + Dv, R) as one matrix
Tensor stacked(const Inputs& x) {
  Tensor w = ops::new_empty(x.uk, {x.h, x.dn + x.dv, x.r});
  Tensor keys = ops::narrow(w, 1, 0, x.dn), values = ops::narrow(w, 1, x.dn, x.dv);
  ops::copy_(keys, x.uk);
  ops::copy_(values, x.uv);
  return ops::view(w, {x.h * (x.dn + x.dv), x.r});
}

/// The latents (B·N, R) with 0 for whatever a masked token holds: 0·NaN would be NaN.
Tensor real_latents(const Inputs& x) {
  Tensor c = x.c;
  if (x.mask) {
    StableIValue stack[] = {ops::detail::from(ops::unsqueeze(*x.mask, 2)), ops::detail::from(c),
                            ops::detail::from(ops::new_zeros(c, {1}))};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::where", "self", stack, TORCH_ABI_VERSION));
    c = ops::detail::to<Tensor>(stack[0]);
  }
  return ops::reshape(c, {x.b * x.n, x.r});
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, std::optional<Tensor> dlse, Tensor q_nope, Tensor q_rope, Tensor c_kv,
    Tensor k_rope, Tensor w_uk, Tensor w_uv, Tensor /* o */, Tensor lse, Mask key_mask,
    double scale, bool causal) {
  const char* op = "tab_cuda::mla_bwd";
  const ops::accelerator::DeviceGuard guard(q_nope.get_device_index());
  const Inputs x(op, q_nope, q_rope, c_kv, k_rope, w_uk, w_uv, key_mask);
  check_output(op, "do", dout, q_nope, x.dv);
  check_lse(op, "lse", lse, q_nope);
  if (dlse) check_lse(op, "dlse", *dlse, q_nope);
  dout = unit_last(dout);
  const Tensor l = ops::contiguous(lse);
  const auto dl = contiguous(dlse);
  Tensor dqn = token_major(x.qn, x.b, x.h, x.n, x.dn);
  Tensor dqr = token_major(x.qn, x.b, x.h, x.n, x.dr);
  Tensor dkr = token_major(x.qn, x.b, x.h, x.n, x.dr);          // of each head
  Tensor both = token_major(x.qn, x.b, x.h, x.n, x.dn + x.dv);  // [dK | dV] of each head
  Tensor dk = ops::narrow(both, 3, 0, x.dn), dv = ops::narrow(both, 3, x.dn, x.dv);
  with_type(op, x.qn, [&](auto type) {
    using T = decltype(type);
    const MlaBackward<T> problem{x.read<T>(scale, causal),
                                 heads<const T>(dout),
                                 static_cast<const float*>(l.data_ptr()),
                                 floats(dl),
                                 heads<T>(dqn),
                                 heads<T>(dqr),
                                 heads<T>(dk),
                                 heads<T>(dv),
                                 heads<T>(dkr)};
    launch(op, problem, problem.BYTES, x.qn);
  });
  const int64_t tokens = x.b * x.n, width = x.h * (x.dn + x.dv);
  const Tensor flat = ops::view(ops::transpose(both, 1, 2), {tokens, width});
  const Tensor dc = ops::view(ops::matmul(flat, stacked(x)), {x.b, x.n, x.r});
  const Tensor dw = ops::matmul(ops::transpose(flat, 0, 1), real_latents(x));
  Tensor dws = ops::view(dw, {x.h, x.dn + x.dv, x.r});
  const int64_t over_heads[] = {1};
  return {dqn,
          dqr,
          dc,
          ops::sum(dkr, over_heads),
          ops::contiguous(ops::narrow(dws, 1, 0, x.dn)),
          ops::contiguous(ops::narrow(dws, 1, x.dn, x.dv))};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tab_cuda, CUDA, m) {
  m.impl("mla_fwd", TORCH_BOX(&forward));
  m.impl("mla_bwd", TORCH_BOX(&backward));
}

}  // namespace tab::few
