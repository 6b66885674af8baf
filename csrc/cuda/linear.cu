// tab_cuda::linear_fwd and tab_cuda::linear_bwd: few tokens, bidirectional, one block a (batch,
// head), one launch. The arithmetic is in linear_small.cuh; here are checks, launch, registration.
#include <tuple>

#include "launch.h"
#include "linear_small.cuh"

namespace tab::few {
namespace {

/// Refuses what this kernel does not take, and inputs that do not fit together.
Sizes check(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
            const std::optional<Tensor>& mask, const std::optional<Tensor>& s,
            const std::optional<Tensor>& z, int64_t feature_map, bool causal, double eps) {
  STD_TORCH_CHECK(q.dim() == 4 && v.dim() == 4, op, ": q and v have four dimensions");
  const int64_t b = q.size(0), h = q.size(1), n = q.size(2), d = q.size(3), dv = v.size(3);
  STD_TORCH_CHECK(!causal && n <= MAX_TOKENS && d <= MAX_SIZE && dv <= MAX_SIZE, op,
                  " (backend=\"cuda\") is bidirectional and takes N ≤ ", MAX_TOKENS,
                  ", D and Dv ≤ ", MAX_SIZE, "; got N ", n, ", D ", d, ", Dv ", dv,
                  causal ? ", causal" : "", "; use backend=\"auto\" or \"triton\"");
  check_shape(op, "k", k, {b, h, n, d});
  check_shape(op, "v", v, {b, h, n, dv});
  check_dtype(op, "k", k, q.scalar_type());
  check_dtype(op, "v", v, q.scalar_type());
  STD_TORCH_CHECK(feature_map >= 0 && feature_map <= 2, op, ": feature_map is 0, 1 or 2");
  STD_TORCH_CHECK(s.has_value() == z.has_value(), op, ": S and z come together");
  check_mask(op, mask, b, n);
  if (s) {
    check_floats(op, "S", *s, {b, h, d, dv});
    check_floats(op, "z", *z, {b, h, d});
  }
  return {static_cast<int>(h), static_cast<int>(n), static_cast<int>(d), static_cast<int>(dv),
          static_cast<int>(feature_map), static_cast<float>(eps),
          bytes_of(mask)};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v,
                                           std::optional<Tensor> key_mask,
                                           std::optional<Tensor> s0, std::optional<Tensor> z0,
                                           int64_t feature_map, bool causal, double eps) {
  const char* op = "tab_cuda::linear_fwd";
  const auto mask = whole(key_mask), s_in = whole(s0), z_in = whole(z0);
  const Sizes a = check(op, q, k, v, mask, s_in, z_in, feature_map, causal, eps);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  q = unit_last(q), k = unit_last(k), v = unit_last(v);
  const int64_t b = q.size(0), h = q.size(1);
  Tensor o = token_major(v, b, h, a.n, a.dv);
  Tensor s = states(q, {b, h, a.d, a.dv}), z = states(q, {b, h, a.d});
  with_type(op, q, [&](auto type) {
    using T = decltype(type);
    const LinearForward<T> problem{
        a, heads<const T>(q), heads<const T>(k), heads<const T>(v), floats(s_in), floats(z_in),
        heads<T>(o), static_cast<float*>(s.data_ptr()), static_cast<float*>(z.data_ptr())};
    launch(op, problem, Shared::bytes(a.n, a.d, a.dv), q);
  });
  return {o, s, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, std::optional<Tensor> ds, std::optional<Tensor> dz, Tensor q, Tensor k, Tensor v,
    Tensor o, Tensor /* s */, Tensor /* z */, std::optional<Tensor> key_mask,
    std::optional<Tensor> s0, std::optional<Tensor> z0, int64_t feature_map, bool causal,
    double eps) {  // S and z are summed again: they would come from further away than the tokens
  const char* op = "tab_cuda::linear_bwd";
  const auto mask = whole(key_mask), s_in = whole(s0), z_in = whole(z0);
  const auto ds_in = whole(ds), dz_in = whole(dz);
  const Sizes a = check(op, q, k, v, mask, s_in, z_in, feature_map, causal, eps);
  check(op, q, k, v, mask, ds_in, dz_in, feature_map, causal, eps);
  const int64_t b = q.size(0), h = q.size(1);
  check_shape(op, "do", dout, {b, h, a.n, a.dv});
  check_shape(op, "o", o, {b, h, a.n, a.dv});
  check_dtype(op, "do", dout, q.scalar_type());
  check_dtype(op, "o", o, q.scalar_type());
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  dout = unit_last(dout), q = unit_last(q), k = unit_last(k), v = unit_last(v), o = unit_last(o);
  Tensor dq = token_major(q, b, h, a.n, a.d), dk = token_major(k, b, h, a.n, a.d);
  Tensor dv = token_major(v, b, h, a.n, a.dv);
  Tensor ds0 = states(q, {b, h, a.d, a.dv}), dz0 = states(q, {b, h, a.d});
  with_type(op, q, [&](auto type) {
    using T = decltype(type);
    const LinearBackward<T> problem{
        a, heads<const T>(dout), heads<const T>(q), heads<const T>(k), heads<const T>(v),
        heads<const T>(o), floats(s_in), floats(z_in), floats(ds_in), floats(dz_in), heads<T>(dq),
        heads<T>(dk), heads<T>(dv), static_cast<float*>(ds0.data_ptr()),
        static_cast<float*>(dz0.data_ptr())};
    launch(op, problem, Shared::bytes(a.n, a.d, a.dv), q);
  });
  return {dq, dk, dv, ds0, dz0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tab_cuda, CUDA, m) {
  m.impl("linear_fwd", TORCH_BOX(&forward));
  m.impl("linear_bwd", TORCH_BOX(&backward));
}

}  // namespace tab::few
