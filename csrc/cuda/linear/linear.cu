// tab_cuda::linear_fwd and tab_cuda::linear_bwd: N ≤ 64, one block a (batch, head), one launch. The
// arithmetic is in linear_small.cuh; here are checks, launch, registration.
#include <tuple>

#include "../core/launch.h"
#include "linear_small_backward.cuh"

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
    STD_TORCH_CHECK(q_in.dim() == 4 && v_in.dim() == 4, op, ": q and v have four dimensions");
    b = q_in.size(0), h = q_in.size(1), n = q_in.size(2), d = q_in.size(3), dv = v_in.size(3);
    check_few(op, q_in);
    STD_TORCH_CHECK(feature_map >= 0 && feature_map <= 2, op, ": feature_map is 0, 1 or 2");
    check_shape(op, "k", k_in, {b, h, n, d});
    check_shape(op, "v", v_in, {b, h, n, dv});
    check_dtype(op, "k", k_in, q_in.scalar_type());
    check_dtype(op, "v", v_in, q_in.scalar_type());
    check_mask(op, key_mask, b, n);
    check_state(op, s, z, q_in, dv);
    q = unit_last(q_in), k = unit_last(k_in), v = unit_last(v_in);
    mask = whole(key_mask), s0 = whole(s), z0 = whole(z);
  }

  template <typename T>
  Linear<T> read(int64_t feature_map, bool causal, double eps) const {
    return {static_cast<int>(h), static_cast<int>(n), static_cast<int>(d), static_cast<int>(dv),
            static_cast<int>(feature_map), causal, static_cast<float>(eps), bytes_of(mask),
            heads<const T>(q), heads<const T>(k), heads<const T>(v), floats(s0), floats(z0)};
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v, Maybe key_mask, Maybe s0,
                                           Maybe z0, int64_t feature_map, bool causal,
                                           double eps) {
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
  check_shape(op, "do", dout, {x.b, x.h, x.n, x.dv});
  check_shape(op, "o", o, {x.b, x.h, x.n, x.dv});
  check_dtype(op, "do", dout, q.scalar_type());
  check_dtype(op, "o", o, q.scalar_type());
  dout = unit_last(dout), o = unit_last(o);
  const auto ds_in = whole(ds), dz_in = whole(dz);
  Tensor dq = token_major(x.q, x.b, x.h, x.n, x.d), dk = token_major(x.k, x.b, x.h, x.n, x.d);
  Tensor dv = token_major(x.v, x.b, x.h, x.n, x.dv);
  Tensor ds0 = states(x.q, {x.b, x.h, x.d, x.dv}), dz0 = states(x.q, {x.b, x.h, x.d});
  with_type(op, x.q, [&](auto type) {
    using T = decltype(type);
    const LinearBackward<T> problem{
        x.read<T>(feature_map, causal, eps), heads<const T>(dout), heads<const T>(o),
        floats(ds_in), floats(dz_in), heads<T>(dq), heads<T>(dk), heads<T>(dv),
        static_cast<float*>(ds0.data_ptr()), static_cast<float*>(dz0.data_ptr())};
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
