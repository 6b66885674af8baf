// tab::mla_decode and tab::mla_decode_paged on the CPU: one query per sequence against a cache of
// latents, absorbed.
//
//     q̃_h = W_uk,hᵀ q_n,h,  S_h = scale·(q̃_h·c + q_r,h·k_r),
//     z_h = softmax(S_h) c,  o_h = W_uv,h z_h
//
// DeepSeek-V2 2024, appendix C. Three steps:
//     absorb  q̃ of a head for all sequences: the weights are read once
//     split   a run of keys of one sequence, all heads: the cache is read once, values are its rows
//     merge   by log-sum-exp over the runs (Flash-Decoding), then W_uv of a head for all sequences
// Runs are cut from the lengths in use, so that ragged sequences keep every thread busy. A cache in
// pages is read where it lies; without them, a sequence is one page.

#include <algorithm>
#include <vector>

#include "../../common.h"

namespace tab {

struct Decode {
  int64_t b, h, dn, dr, r, dv;
  double scale;
  int64_t page, pages;            // rows of a page, pages of a sequence
  const int64_t* table;           // (B, pages): which page of the cache; null: sequence b is page b
  Rows qn, qr, cache, uk, uv, o;  // cache: b and n are the page and the row
  void *q, *lse;                  // (B, H, padded R+Dr and one vector); (B, H)
};
struct DecodePiece {
  int64_t b, from, to;
};
struct DecodeScratch {
  int64_t absorb, split, merge;
};
struct DecodeKernels {
  int64_t lanes;
  DecodeScratch (*scratch)(const Decode&);
  void (*absorb)(const Decode&, int64_t head, void* scratch);
  void (*split)(const Decode&, const DecodePiece&, void* result, void* scratch);
  void (*merge)(const Decode&, int64_t head, const int64_t* first, const void* results,
                void* scratch);
};

}  // namespace tab

#define TAB_KERNEL "../mla/mla_decode_kernel.h"
#include "../core/each_isa.h"

namespace tab {
namespace {

/// The numbers of an int32 or int64 tensor.
std::vector<int64_t> integers(const char* op, const char* name, const Tensor& given) {
  const bool wide = given.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || given.scalar_type() == ScalarType::Int, op, ": ", name,
                  " are int32 or int64");
  const Tensor x = torch::stable::contiguous(given);
  const void* data = x.data_ptr();
  std::vector<int64_t> result(x.numel());
  for (size_t i = 0; i < result.size(); ++i)
    result[i] = wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  return result;
}

/// The cache rows in use, at most `most`.
std::vector<int64_t> lengths(const char* op, const Tensor& seqlens, int64_t most) {
  std::vector<int64_t> result = integers(op, "seqlens", seqlens);
  for (int64_t& n : result) n = std::clamp<int64_t>(n, 0, most);
  return result;
}

/// The pages in use lie in the cache.
void check_pages(const char* op, const Decode& a, const std::vector<int64_t>& length,
                 int64_t count) {
  for (int64_t b = 0; b < a.b; ++b)
    for (int64_t i = 0; i < ceiling(length[b], a.page); ++i) {
      const int64_t page = a.table[b * a.pages + i];
      STD_TORCH_CHECK(page >= 0 && page < count, op, ": page_table[", b, ", ", i, "] is ", page,
                      ", and the cache has pages 0 to ", count - 1);
    }
}

std::tuple<Tensor, Tensor> attend(const char* op, Tensor qn, Tensor qr, Tensor cache,
                                  std::optional<Tensor> page_table, Tensor seqlens, Tensor uk,
                                  Tensor uv, double scale) {
  STD_TORCH_CHECK(
      qn.dim() == 3 && qr.dim() == 3 && cache.dim() == 3 && uk.dim() == 3 && uv.dim() == 3, op,
      ": q is (B, H, D), cache (B, N, R+Dr), w (H, ·, R)");
  Decode a{};
  a.b = qn.size(0), a.h = qn.size(1), a.dn = qn.size(2), a.dr = qr.size(2), a.r = uk.size(2);
  a.dv = uv.size(1), a.scale = scale;
  STD_TORCH_CHECK(a.b * a.h * a.dn * a.r * a.dv > 0, op, ": an empty dimension");
  check_shape(op, "q_rope", qr, {a.b, a.h, a.dr});
  check_shape(op, "cache", cache, {page_table ? cache.size(0) : a.b, cache.size(1), a.r + a.dr});
  a.page = cache.size(1), a.pages = page_table ? page_table->size(1) : 1;
  check_shape(op, "w_uk", uk, {a.h, a.dn, a.r});
  check_shape(op, "w_uv", uv, {a.h, a.dv, a.r});
  check_shape(op, "seqlens", seqlens, {a.b});
  const std::vector<int64_t> length = lengths(op, seqlens, a.pages * a.page);
  std::vector<int64_t> table;
  if (page_table) {
    check_shape(op, "page_table", *page_table, {a.b, a.pages});
    table = integers(op, "page_table", *page_table);
    a.table = table.data();
    check_pages(op, a, length, cache.size(0));
  }
  for (const Tensor* x : {&qr, &cache, &uk, &uv}) check_dtype(op, "an input", *x, qn.scalar_type());
  qn = unit_last(qn), qr = unit_last(qr), cache = unit_last(cache);
  uk = unit_last(uk), uv = unit_last(uv);
  const auto point = [](Rows& rows, const Tensor& x, int64_t Rows::* outer, int64_t Rows::* inner) {
    rows.data = x.data_ptr(), rows.*outer = x.stride(0), rows.*inner = x.stride(1);
  };
  const ScalarType acc = accumulator(qn);
  const Tensor o = torch::stable::new_empty(qn, {a.b, a.h, a.dv});
  const Tensor lse = torch::stable::new_empty(qn, {a.b, a.h}, acc);
  point(a.qn, qn, &Rows::b, &Rows::h), point(a.qr, qr, &Rows::b, &Rows::h);
  point(a.o, o, &Rows::b, &Rows::h), point(a.cache, cache, &Rows::b, &Rows::n);
  point(a.uk, uk, &Rows::h, &Rows::n), point(a.uv, uv, &Rows::h, &Rows::n);
  a.lse = lse.data_ptr();

  return dispatch(op, qn, [&]<class T>() -> std::tuple<Tensor, Tensor> {
    using A = acc_t<T>;
    const DecodeKernels& kernels = TAB_SELECT(decode_kernels<T>);
    const auto padded = [&](int64_t n) { return up(n, kernels.lanes); };
    const DecodeScratch work = kernels.scratch(a);
    const Tensor q =
        torch::stable::new_empty(qn, {a.b * a.h * (padded(a.r + a.dr) + kernels.lanes)}, acc);
    a.q = q.data_ptr();
    parallel(a.h, [&](int64_t head) { kernels.absorb(a, head, arena<A>(work.absorb).next); });

    int64_t total = 0;
    for (int64_t n : length) total += n;
    const int64_t share = ceiling(total, 4 * threads());
    const int64_t run = std::max<int64_t>(256, up(share, 64));  // shorter ones cost more
    std::vector<DecodePiece> pieces;
    std::vector<int64_t> first{0};
    for (int64_t b = 0; b < a.b; ++b) {
      for (int64_t j = 0; j < length[b]; j += run)
        pieces.push_back({b, j, std::min(length[b], j + run)});
      first.push_back(pieces.size());
    }
    const int64_t size = a.h * padded(a.r) + 2 * padded(a.h), count = pieces.size();
    const Tensor results = torch::stable::new_empty(qn, {count * size}, acc);
    A* each = static_cast<A*>(results.data_ptr());
    parallel(count, [&](int64_t i) {
      kernels.split(a, pieces[i], each + i * size, arena<A>(work.split).next);
    });
    parallel(a.h, [&](int64_t head) {
      kernels.merge(a, head, first.data(), each, arena<A>(work.merge).next);
    });
    return {o, lse};
  });
}

std::tuple<Tensor, Tensor> decode(Tensor qn, Tensor qr, Tensor cache, Tensor seqlens, Tensor uk,
                                  Tensor uv, double scale) {
  return attend("mla_decode", qn, qr, cache, {}, seqlens, uk, uv, scale);
}

std::tuple<Tensor, Tensor> decode_paged(Tensor qn, Tensor qr, Tensor cache, Tensor page_table,
                                        Tensor seqlens, Tensor uk, Tensor uv, double scale) {
  STD_TORCH_CHECK(page_table.dim() == 2, "mla_decode_paged: page_table is (B, M)");
  return attend("mla_decode_paged", qn, qr, cache, page_table, seqlens, uk, uv, scale);
}

}  // namespace
}  // namespace tab

STABLE_TORCH_LIBRARY_IMPL(tab, CPU, m) {
  m.impl("mla_decode", TORCH_BOX(&tab::decode));
  m.impl("mla_decode_paged", TORCH_BOX(&tab::decode_paged));
}
