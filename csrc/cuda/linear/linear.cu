// tab_cuda::linear_fwd and tab_cuda::linear_bwd: N ≤ 64, one block a (batch, head), one launch. The
// arithmetic is in linear.cuh; here are checks, launch, registration.
#include <tuple>

#include "../core/launch.h"
#include "linear_backward.cuh"

namespace tab::few {
namespace {

using Maybe = std::optional<Tensor>;

/// S (B, H, D, Dv) and z (B, H, D), or neither
void check_state(const char* op, const Maybe& s, const Maybe& z, const Tensor& q, int64_t dv) {
  STD_TORCH_CHECK(s.has_value() == z.has_value(), op, ": S and z come together");
  if (!s) return;
  check_floats(op, "S", *s, {q.size(0), q.size(1), q.size(3), dv});
  check_floats(op, "z", *z, {q.size(0), q.size(1), q.size(3)});
}

struct Inputs {
  Tensor q, k, v;
  Maybe mask, s0, z0;
  int64_t b, h, n, d, dv;

  /// Refuses what this kernel does not take, and inputs that do not fit together.
  Inputs(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
         const Maybe& key_mask, const Maybe& s, const Maybe& z, int64_t feature_map) {
    check_qkv(op, q_in, k_in, v_in);
    b = q_in.size(0), h = q_in.size(1), n = q_in.size(2), d = q_in.size(3), dv = v_in.size(3);
    check_few(op, q_in);
    STD_TORCH_CHECK(feature_map >= 0 && feature_map <= 2, op, ": feature_map is 0, 1 or 2");
    check_mask(op, key_mask, b, n);
    check_state(op, s, z, q_in, dv);
    q = unit_last(q_in), k = unit_last(k_in), v = unit_last(v_in);
    mask = contiguous(key_mask), s0 = contiguous(s), z0 = contiguous(z);
  }

  template <typename T>
  Linear<T> read(int64_t feature_map, bool causal, double eps) const {
    return {static_cast<int>(h),
            static_cast<int>(n),
            static_cast<int>(d),
            static_cast<int>(dv),
            static_cast<int>(feature_map),
            causal,
            static_cast<float>(eps),
            mask_bytes(mask),
            heads<const T>(q),
            heads<const T>(k),
            heads<const T>(v),
            floats(s0),
            floats(z0)};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Maybe key_mask, Maybe s0,
                                           Maybe z0, int64_t feature_map, bool causal, double eps) {
  const char* op = "tab_cuda::linear_fwd";
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs x(op, q, k, v, key_mask, s0, z0, feature_map);
  Tensor o = token_major(x.v, x.b, x.h, x.n, x.dv);
  Tensor s = states(x.q, {x.b, x.h, x.d, x.dv}), z = states(x.q, {x.b, x.h, x.d});
  with_type(op, x.q, [&](auto type) {
    using T = decltype(type);
    const LinearForward<T> problem{x.read<T>(feature_map, causal, eps), heads<T>(o),
                                   static_cast<float*>(s.data_ptr()),
                                   static_cast<float*>(z.data_ptr())};
    launch(op, problem, problem.BYTES, x.q);
  });
  return {o, s, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, Maybe ds, Maybe dz, Tensor q, Tensor k, Tensor v, Tensor o, Tensor /* s */,
    Tensor /* z */, Maybe key_mask, Maybe s0, Maybe z0, int64_t feature_map, bool causal,
    double eps) {  // S and z are not needed: the order is quadratic
  const char* op = "tab_cuda::linear_bwd";
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs x(op, q, k, v, key_mask, s0, z0, feature_map);
  check_state(op, ds, dz, q, x.dv);
  check_output(op, "do", dout, q, x.dv);
  check_output(op, "o", o, q, x.dv);
  dout = unit_last(dout), o = unit_last(o);
  const auto ds_in = contiguous(ds), dz_in = contiguous(dz);
  Tensor dq = token_major(x.q, x.b, x.h, x.n, x.d), dk = token_major(x.k, x.b, x.h, x.n, x.d);
  Tensor dv = token_major(x.v, x.b, x.h, x.n, x.dv);
  Tensor ds0 = states(x.q, {x.b, x.h, x.d, x.dv}), dz0 = states(x.q, {x.b, x.h, x.d});
  with_type(op, x.q, [&](auto type) {
    using T = decltype(type);
    const LinearBackward<T> problem{x.read<T>(feature_map, causal, eps),
                                    heads<const T>(dout),
                                    heads<const T>(o),
                                    floats(ds_in),
                                    floats(dz_in),
                                    heads<T>(dq),
                                    heads<T>(dk),
                                    heads<T>(dv),
                                    static_cast<float*>(ds0.data_ptr()),
                                    static_cast<float*>(dz0.data_ptr())};
    launch(op, problem, problem.BYTES, x.q);
  });
  return {dq, dk, dv, ds0, dz0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tab_cuda, CUDA, m) {
  m.impl("linear_fwd", TORCH_BOX(&forward));
  m.impl("linear_bwd", TORCH_BOX(&backward));
}

}  // namespace tab::few
