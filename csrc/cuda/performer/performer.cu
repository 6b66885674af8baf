// tab_cuda::performer_fwd and tab_cuda::performer_bwd: N ≤ 64, one block a (batch, head), one launch.
// The arithmetic is in performer_bidirectional.cuh or, causal or with states, performer_causal.cuh.
#include <tuple>

#include "../core/launch.h"
#include "performer_bidirectional_backward.cuh"
#include "performer_causal_backward.cuh"

namespace tab::few {
namespace {

using Maybe = std::optional<Tensor>;

struct Inputs {
  Tensor q, k, v, w;
  Maybe mask, s0, z0, c0;
  int64_t b, h, n, d, dv, m;
  bool relu;

  Inputs(const char* op, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
         const Tensor& projection, const Maybe& key_mask, const Maybe& s0_in, const Maybe& z0_in,
         const Maybe& c0_in, int64_t kernel)
      : relu(kernel == 1) {
    check_qkv(op, q_in, k_in, v_in);
    STD_TORCH_CHECK(projection.dim() == 2, op, ": projection is (M, D)");
    b = q_in.size(0), h = q_in.size(1), n = q_in.size(2), d = q_in.size(3), dv = v_in.size(3);
    m = projection.size(0);
    check_few(op, q_in);
    STD_TORCH_CHECK(kernel == 0 || kernel == 1, op, ": kernel is 0 or 1");
    check_floats(op, "projection", projection, {m, d});
    check_mask(op, key_mask, b, n);
    STD_TORCH_CHECK(
        s0_in.has_value() == z0_in.has_value() && s0_in.has_value() == c0_in.has_value(), op,
        ": S, z and c come together");
    if (s0_in) {
      check_floats(op, "S", *s0_in, {b, h, m, dv});
      check_floats(op, "z", *z0_in, {b, h, m});
      check_floats(op, "c", *c0_in, {b, h, m});
    }
    s0 = contiguous(s0_in), z0 = contiguous(z0_in), c0 = contiguous(c0_in);
    q = unit_last(q_in), k = unit_last(k_in), v = unit_last(v_in);
    w = torch::stable::contiguous(projection), mask = contiguous(key_mask);
  }

  State from() const { return {floats(s0), floats(z0), floats(c0)}; }

  template <typename T, typename E = T>
  Performer<T, E> read() const {
    return {static_cast<int>(h), static_cast<int>(n),
            static_cast<int>(d), static_cast<int>(dv),
            static_cast<int>(m), relu,
            mask_bytes(mask),    static_cast<const float*>(w.data_ptr()),
            heads<const T>(q),   heads<const T>(k),
            heads<const T>(v)};
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor q, Tensor k, Tensor v,
                                                           Tensor projection, Maybe key_mask,
                                                           Maybe s0, Maybe z0, Maybe c0,
                                                           int64_t kernel, bool causal,
                                                           double eps) {
  const char* op = "tab_cuda::performer_fwd";
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs x(op, q, k, v, projection, key_mask, s0, z0, c0, kernel);
  Tensor o = token_major(x.v, x.b, x.h, x.n, x.dv), s = states(x.q, {x.b, x.h, x.m, x.dv});
  Tensor z = states(x.q, {x.b, x.h, x.m}), c = states(x.q, {x.b, x.h, x.m});
  Tensor lse = states(x.q, {x.b, x.h, x.n});
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  with_type(op, x.q, [&](auto type) {
    using T = decltype(type);
    const auto e = static_cast<float>(eps);
    if (causal || s0) {
      const PerformerCausalForward<T> problem{x.read<T, float>(), causal,  e,       x.from(),
                                              heads<T>(o),        data(s), data(z), data(c),
                                              data(lse)};
      launch(op, problem, problem.BYTES, x.q);
    } else {
      const PerformerBidirectionalForward<T> problem{x.read<T>(), e,       heads<T>(o), data(s),
                                                     data(z),     data(c), data(lse)};
      launch(op, problem, problem.BYTES, x.q);
    }
  });
  return {o, s, z, c, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, Maybe ds, Maybe dz, Tensor q, Tensor k, Tensor v, Tensor projection, Tensor o,
    Tensor /* s */, Tensor /* z */, Tensor c, Tensor lse, Maybe key_mask, Maybe s0, Maybe z0,
    Maybe c0, int64_t kernel, bool causal) {
  const char* op = "tab_cuda::performer_bwd";
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const Inputs x(op, q, k, v, projection, key_mask, s0, z0, c0, kernel);
  STD_TORCH_CHECK(ds.has_value() == dz.has_value(), op, ": dS and dz come together");
  if (ds) {
    check_floats(op, "dS", *ds, {x.b, x.h, x.m, x.dv});
    check_floats(op, "dz", *dz, {x.b, x.h, x.m});
  }
  check_output(op, "do", dout, q, x.dv);
  check_output(op, "o", o, q, x.dv);
  check_floats(op, "c", c, {x.b, x.h, x.m});
  check_lse(op, "lse", lse, q);
  dout = unit_last(dout), o = unit_last(o);
  c = torch::stable::contiguous(c), lse = torch::stable::contiguous(lse);
  Tensor dq = token_major(x.q, x.b, x.h, x.n, x.d), dk = token_major(x.k, x.b, x.h, x.n, x.d);
  Tensor dv = token_major(x.v, x.b, x.h, x.n, x.dv);
  const auto ds_in = contiguous(ds), dz_in = contiguous(dz);
  Tensor ds0 = s0 ? states(x.q, {x.b, x.h, x.m, x.dv}) : states(x.q, {0});
  Tensor dz0 = s0 ? states(x.q, {x.b, x.h, x.m}) : states(x.q, {0});
  const auto data = [](const Tensor& t) { return static_cast<float*>(t.data_ptr()); };
  with_type(op, x.q, [&](auto type) {
    using T = decltype(type);
    if (causal || s0 || ds) {
      const PerformerCausalBackward<T> problem{{x.read<T, float>(),
                                                causal,
                                                x.from(),
                                                {floats(ds_in), floats(dz_in), data(c)},
                                                heads<const T>(dout),
                                                heads<const T>(o),
                                                data(lse)},
                                               heads<T>(dq),
                                               heads<T>(dk),
                                               heads<T>(dv),
                                               data(ds0),
                                               data(dz0)};
      launch(op, problem, problem.BYTES, x.q);
    } else {
      const PerformerBidirectionalBackward<T> problem{
          x.read<T>(), heads<const T>(dout), heads<const T>(o), data(c),
          data(lse),   heads<T>(dq),         heads<T>(dk),      heads<T>(dv)};
      launch(op, problem, problem.BYTES, x.q);
    }
  });
  return {dq, dk, dv, ds0, dz0};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(tab_cuda, CUDA, m) {
  m.impl("performer_fwd", TORCH_BOX(&forward));
  m.impl("performer_bwd", TORCH_BOX(&backward));
}

}  // namespace tab::few
