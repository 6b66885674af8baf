// Softmax attention over chosen keys, the plain data: what local.cpp and sparse.cpp share with their
// kernels (softmax_kernel.h, softmax_backward.h) and with the drivers (softmax_driver.h).
//
// A strip is some queries of one (b, h) against a list of runs of keys: two vectors of them, a panel,
// and backward as many panels as are 32 floats, since each visit of a strip to a key costs a sum that
// is loaded and stored. Its scores are kept transposed, Sᵀ (keys, queries):
//     Sᵀ = K·Qᵀ     K is read row by row where it lies: only Q, the small side, is transposed
//     softmax       runs down the columns: a maximum and a sum for every lane, nothing horizontal
//     O = (Sᵀ)ᵀ·V   V is read where it lies
// so no panel of K or V is packed. Long lists go in chunks whose scores fit the L2, with the online
// rescaling of Milakov & Gimelshein 2018.
#pragma once

#include "../core/attention.h"

namespace tab {

struct Softmax : Attention {
  int64_t m, shift;   // keys; query i stands at the token i + shift of the keys, m - n
  int64_t kv, group;  // heads of k and v; heads of q that share one of them: H / kv
  int64_t strips;     // of one head of q
  int64_t chunk;      // keys whose scores are held at once
  bool copy;          // K and V go through scratch: to convert them or to pad their rows
  int64_t runs;       // room for those of a strip
  int64_t workers;    // the next task of a thread is likely so many heads further on
  bool causal;
  double scale, softcap;  // softcap 0: none
  const void* slopes;     // (H,) in the accumulation type, or null
  void* lse;              // (B, H, N) in the accumulation type, packed (1, H, T)
  const void* dlse;       // like it, or null
  int64_t row;            // of both: N or T
};

/// `count` keys from `first` on. Bit r of `rows`: the r-th block row of the strip lists them.
struct Run {
  int64_t first, count, rows;
};

/// Runs that lie side by side in memory: `first` among the tokens, `at` in the chunk.
struct Stretch {
  int64_t at, first, count;
};

/// Where the gradients of the keys [first, last) are summed: those of j at dk + (j - first)·ldk.
struct Sums {
  void *dk, *dv;
  int64_t ldk, ldv, first, last;
};

/// The strips first, first + step, … below last of one (b, head of k and v): those of its first head
/// of q, then those of the next.
struct Part {
  int64_t head, first, last, step;
};

/// How many keys a part of so many queries may copy side by side before it begins. In a token-major
/// tensor the rows of a head lie H·D apart. Where that is a multiple of 1 KiB they share a few sets of
/// the caches, which then hold few of the keys that the strips visit again and again. 0 where they lie
/// better, where each would serve few queries, or where they are very many.
TAB_INLINE int64_t keys_together(const Softmax& a, int64_t queries, int64_t bytes) {
  const bool apart = a.k.n * bytes % 1024 == 0 || a.v.n * bytes % 1024 == 0;
  const int64_t most = 4 * queries < a.m ? 4 * queries : a.m;
  return !a.copy && apart && most * (a.d + a.e) <= int64_t{1} << 20 ? most : 0;
}

/// `strips` runs forward without sums, else backward. `finish` writes the gradients of the keys
/// j0 … j1 of one head as the sum of the parts that hold them.
template <class Args>
struct SoftmaxKernels {
  int64_t lanes, forward, backward;  // the last two: queries in a strip
  void (*strips)(const Args&, const Part&, const Sums*, Run*, Stretch*, void* scratch);
  void (*finish)(const Args&, int64_t head, int64_t j0, int64_t j1, const Sums* parts,
                 int64_t count, void* scratch);
};

}  // namespace tab
