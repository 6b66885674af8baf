// The arithmetic of csrc/cuda/linear.cu on the CPU: blocks, phases and threads one after another.
// `backwards` runs the threads of a phase in the opposite order: a phase that needs a barrier inside
// would then give other results. Loaded by tests/test_cuda_build.py.
#include "../csrc/cuda/linear_small.cuh"

#include <vector>

using namespace tab::few;

struct Tensors {  // (B, H, N, D) and (B, H, N, Dv) each with one set of strides; states contiguous
  int64_t b, d_strides[3], dv_strides[3];
  const float *dout, *q, *k, *v, *o, *s0, *z0, *ds, *dz;
  float *out, *s, *z, *dq, *dk, *dv, *ds0, *dz0;
};

template <typename Problem>
static void run(const Problem& problem, int64_t blocks, int threads, bool backwards) {
  const Sizes& a = problem.sizes;
  for (int64_t block = 0; block < blocks; ++block) {
    std::vector<float> memory(Shared::bytes(a.n, a.d, a.dv) / 4, NAN);  // as undefined as on a GPU
    for (int p = 0; p < Problem::PHASES; ++p)
      for (int t = 0; t < threads; ++t)
        problem.phase(p, block, backwards ? threads - 1 - t : t, threads, memory.data());
  }
}

extern "C" void linear_small(const Tensors& x, const Sizes& sizes, int threads, bool backwards) {
  const auto at = [](auto* data, const int64_t* s) {
    return Heads<std::remove_pointer_t<decltype(data)>>{data, s[0], s[1], s[2]};
  };
  const int64_t *d = x.d_strides, *dv = x.dv_strides, blocks = x.b * sizes.heads;
  run(Forward<float>{sizes, at(x.q, d), at(x.k, d), at(x.v, dv), x.s0, x.z0, at(x.out, dv), x.s,
                     x.z},
      blocks, threads, backwards);
  run(Backward<float>{sizes, at(x.dout, dv), at(x.q, d), at(x.k, d), at(x.v, dv), at(x.o, dv), x.s0,
                      x.z0, x.ds, x.dz, at(x.dq, d), at(x.dk, d), at(x.dv, dv), x.ds0, x.dz0},
      blocks, threads, backwards);
}
