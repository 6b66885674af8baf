// The kernels of csrc/cuda for a few tokens on the CPU (cuda_on_cpu.h), called by tests/cuda
// with the argument structures that the launchers fill. Each returns "" or what went wrong. The tests
// define one of LINEAR, MLA, PERFORMER and SOFTMAX: they compile what they need.
#include "../../csrc/cuda/core/device.cuh"
#ifdef LINEAR
#include "../../csrc/cuda/linear/linear_backward.cuh"
#endif
#ifdef MLA
#include "../../csrc/cuda/mla/mla_backward.cuh"
#endif
#ifdef PERFORMER
#include "../../csrc/cuda/performer/performer_bidirectional_backward.cuh"
#include "../../csrc/cuda/performer/performer_causal_backward.cuh"
#endif
#ifdef SOFTMAX
#include "../../csrc/cuda/softmax/softmax_backward.cuh"
#endif

using namespace tab::few;

static std::string message;

template <template <typename> typename Problem>
static const char* run(const void* problem, int type, int blocks, int64_t bytes) {
  const auto go = [&]<typename T>(T) {
    const auto& typed = *static_cast<const Problem<T>*>(problem);
    message = cpu::run(typed, blocks, typed.THREADS, bytes, sizeof(T));
  };
  type == 0 ? go(float{}) : type == 1 ? go(__half{}) : go(__nv_bfloat16{});
  return message.c_str();
}

/// BYTES(T) is the shared memory that the launcher asks for.
#define TAB_KERNEL(name, Problem)                                                           \
  extern "C" [[gnu::visibility("default")]] const char* name(const void* problem, int type, \
                                                             int blocks) {                  \
    const int64_t bytes = type == 0 ? Problem<float>::BYTES : Problem<__half>::BYTES;       \
    return run<Problem>(problem, type, blocks, bytes);                                      \
  }
#ifdef LINEAR
TAB_KERNEL(linear_fwd, LinearForward)
TAB_KERNEL(linear_bwd, LinearBackward)
#endif
#ifdef MLA
TAB_KERNEL(mla_fwd, MlaForward)
TAB_KERNEL(mla_bwd, MlaBackward)
#endif
#ifdef PERFORMER
TAB_KERNEL(performer_bidirectional_fwd, PerformerBidirectionalForward)
TAB_KERNEL(performer_bidirectional_bwd, PerformerBidirectionalBackward)
TAB_KERNEL(performer_causal_fwd, PerformerCausalForward)
TAB_KERNEL(performer_causal_bwd, PerformerCausalBackward)
#endif
#ifdef SOFTMAX
TAB_KERNEL(softmax_fwd, SoftmaxForward)
TAB_KERNEL(softmax_bwd, SoftmaxBackward)
#endif
