// Packed batches: sequences one behind the other in (1, H, T, D), cut by the ends of each. A kernel is
// given one of them as though it were a dense batch of its own, over the same memory, so that no
// kernel knows of packing and nothing is copied.
#pragma once

#include <cstring>
#include <vector>

#include "attention.h"

namespace tab {

/// Where the sequences end, with a 0 before them; not packed where no cu_seqlens is given.
struct Ends {
  bool packed = false;
  std::vector<int64_t> at;

  Ends() = default;
  /// Of a batch of one entry with T tokens.
  Ends(const char* op, const Tensor& cu_seqlens, int64_t batch, int64_t tokens) : packed(true) {
    const Tensor x = torch::stable::contiguous(cu_seqlens);
    const bool wide = x.scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK(x.dim() == 1 && (wide || x.scalar_type() == ScalarType::Int), op,
                    ": cu_seqlens is (S + 1,) int32 or int64");
    for (int64_t i = 0; i < x.numel(); ++i)
      at.push_back(wide ? static_cast<const int64_t*>(x.data_ptr())[i]
                        : static_cast<const int32_t*>(x.data_ptr())[i]);
    bool good = batch == 1 && !at.empty() && at.front() == 0 && at.back() == tokens;
    for (int64_t i = 1; good && i < x.numel(); ++i) good = at[i - 1] <= at[i];
    STD_TORCH_CHECK(good, op, ": cu_seqlens does not fit the tokens");
  }
  int64_t count() const { return static_cast<int64_t>(at.size()) - 1; }
};

/// x from token `from` on.
template <class T>
void skip(Rows& x, int64_t from) {
  if (x.data != nullptr) x.data = static_cast<T*>(x.data) + from * x.n;
}

/// The tokens [from, to) of `a`, whose tensors are of type T.
template <class T, class Args>
Args sequence(const Args& a, int64_t from, int64_t to) {
  Args x = a;
  x.n = to - from;
  if (x.mask != nullptr) x.mask += from;
  for (Rows* rows : {&x.q, &x.k, &x.v, &x.o, &x.grad, &x.dq, &x.dk, &x.dv}) skip<T>(*rows, from);
  return x;
}

/// x, or zeros like another tensor.
inline Tensor or_zeros(const std::optional<Tensor>& x, const Tensor& like) {
  if (x) return *x;
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < like.dim(); ++i) sizes.push_back(like.size(i));
  const Tensor zeros = torch::stable::new_empty(like, sizes);
  const ScalarType type = like.scalar_type();
  const int64_t width = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  std::memset(zeros.data_ptr(), 0, zeros.numel() * width);
  return zeros;
}

/// The gradient of what was not there, in a packed op whose results are no options.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

}  // namespace tab
