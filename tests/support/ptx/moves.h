// Instructions that move: loads, stores, cp.async, ldmatrix, shuffles.
#pragma once
#include "memory.h"

namespace ptx {

inline uint64_t address(Warp& w, const uint32_t* o, int lane) {  // register, its width, offset
  const int32_t offset = int32_t(o[2]);
  return o[1] == 8 ? w.at<uint64_t>(o[0])[lane] + int64_t(offset)
                   : uint32_t(w.at<uint32_t>(o[0])[lane] + uint32_t(offset));
}

// o: address (3), bytes of an element, elements, signed; register and its width for each element
template <bool SHARED>
void load(Warp& w, const uint32_t* o, Mask m) {
  const uint32_t size = o[3], count = o[4];
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    const uint64_t at = address(w, o, l);
    const char* from =
        w.block->find(SHARED, at, size * count).read(at, size * count, w.block->who(w));
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t width = o[7 + 2 * i];
      char* to = w.at<char>(o[6 + 2 * i]) + l * width;
      const bool negative = o[5] && from[i * size + size - 1] < 0;
      std::memset(to, negative ? 0xFF : 0, width);
      std::memcpy(to, from + i * size, std::min(size, width));
    }
  }
}

template <bool SHARED>
void store(Warp& w, const uint32_t* o, Mask m) {
  const uint32_t size = o[3], count = o[4];
  char values[16];
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    for (uint32_t i = 0; i < count; ++i)
      std::memcpy(values + i * size, w.at<char>(o[6 + 2 * i]) + l * o[7 + 2 * i], size);
    const uint64_t at = address(w, o, l);
    w.block->find(SHARED, at, size * count).write(at, size * count, w.block->who(w), values);
  }
}

// o: to (3), from (3), bytes, register of how many of them are real
inline void cp_async(Warp& w, const uint32_t* o, Mask m) {
  for (int l = 0; l < LANES; ++l) {
    if (!(m >> l & 1)) continue;
    const Copy copy{uint32_t(address(w, o, l)), o[6], w.at<uint32_t>(o[7])[l],
                    address(w, o + 3, l)};
    w.block->find(true, copy.to, copy.size).fly(copy.to, copy.size, w.block->who(w));
    w.open.push_back(copy);
  }
}

inline void cp_commit(Warp& w, const uint32_t*, Mask m) {
  together(m, "cp.async.commit_group");
  w.groups.push_back(std::exchange(w.open, {}));
}

// Only now what was copied arrives: the latest that PTX allows.
inline void cp_wait(Warp& w, const uint32_t* o, Mask m) {
  together(m, "cp.async.wait_group");
  const Who who = w.block->who(w);
  for (; w.groups.size() > o[0]; w.groups.erase(w.groups.begin()))
    for (const Copy& c : w.groups.front()) {
      char values[16] = {};
      if (c.real)
        std::memcpy(values, w.block->find(false, c.from, c.real).read(c.from, c.real, who), c.real);
      w.block->find(true, c.to, c.size).land(c.to, c.size, who, values);
    }
}

// o: address (3), then N registers; lane l holds of matrix i, row l / 4, the elements from 2(l % 4)
template <int N, bool TRANSPOSED>
void ldmatrix(Warp& w, const uint32_t* o, Mask m) {
  together(m, "ldmatrix");
  for (int i = 0; i < N; ++i) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      const uint64_t at = address(w, o, 8 * i + r);
      std::memcpy(rows[r], w.block->find(true, at, 16).read(at, 16, w.block->who(w)), 16);
    }
    uint16_t* to = w.at<uint16_t>(o[3 + i]);
    for (int l = 0; l < LANES; ++l)
      for (int k = 0; k < 2; ++k) {
        const int row = l / 4, column = 2 * (l % 4) + k;
        to[2 * l + k] = TRANSPOSED ? rows[column][row] : rows[row][column];
      }
  }
}

enum class Shuffle { up, down, bfly, idx };

// o: destination, whether a lane found its source (or ~0), source, b, c
template <Shuffle HOW>
void shfl(Warp& w, const uint32_t* o, Mask m) {
  uint32_t from[LANES], *to = w.at<uint32_t>(o[0]);
  std::copy_n(w.at<uint32_t>(o[2]), LANES, from);
  for (int lane = 0; lane < LANES; ++lane) {
    if (!(m >> lane & 1)) continue;
    const int b = w.at<uint32_t>(o[3])[lane] & 31, c = w.at<uint32_t>(o[4])[lane] & 31;
    const int segment = w.at<uint32_t>(o[4])[lane] >> 8 & 31;
    const int most = (lane & segment) | (c & ~segment), least = lane & segment;
    const int source = HOW == Shuffle::up     ? lane - b
                       : HOW == Shuffle::down ? lane + b
                       : HOW == Shuffle::bfly ? lane ^ b
                                              : least | (b & ~segment);
    const bool found = HOW == Shuffle::up ? source >= most : source <= most;
    if (found && !(m >> source & 1)) throw Fault("shfl from a lane that takes no part");
    to[lane] = from[found ? source : lane];
    if (o[1] != ~0u) w.at<bool>(o[1])[lane] = found;
  }
}

// o: destination, source; of all lanes one T
template <class T, T (*JOIN)(T, T)>
void redux(Warp& w, const uint32_t* o, Mask m) {
  together(m, "redux");
  T all = w.at<T>(o[1])[0];
  for (int l = 1; l < LANES; ++l) all = JOIN(all, w.at<T>(o[1])[l]);
  std::fill_n(w.at<T>(o[0]), LANES, all);
}

template <class T>
T sum(T a, T b) {
  return T(a + b);
}
template <class T>
T least(T a, T b) {
  return std::min(a, b);
}
template <class T>
T most(T a, T b) {
  return std::max(a, b);
}

// o: wide register, its width, parts; the parts
inline void pack(Warp& w, const uint32_t* o, Mask m) {
  const uint32_t size = o[1] / o[2];
  for (int l = 0; l < LANES; ++l)
    for (uint32_t i = 0; m >> l & 1 && i < o[2]; ++i)
      std::memcpy(w.at<char>(o[0]) + l * o[1] + i * size, w.at<char>(o[3 + i]) + l * size, size);
}

inline void unpack(Warp& w, const uint32_t* o, Mask m) {
  const uint32_t size = o[1] / o[2];
  for (int l = 0; l < LANES; ++l)
    for (uint32_t i = 0; m >> l & 1 && i < o[2]; ++i)
      if (o[3 + i] != ~0u)
        std::memcpy(w.at<char>(o[3 + i]) + l * size, w.at<char>(o[0]) + l * o[1] + i * size, size);
}

inline void moves(Table& t) {
  t["ld.shared"] = {load<true>, ""}, t["ld.global"] = {load<false>, ""};
  t["st.shared"] = {store<true>, ""}, t["st.global"] = {store<false>, ""};
  t["cp.async"] = {cp_async, ""};
  t["cp.async.commit_group"] = {cp_commit, ""}, t["cp.async.wait_group"] = {cp_wait, ""};
  t["ldmatrix.x1"] = {ldmatrix<1, false>, ""}, t["ldmatrix.x1.trans"] = {ldmatrix<1, true>, ""};
  t["ldmatrix.x2"] = {ldmatrix<2, false>, ""}, t["ldmatrix.x2.trans"] = {ldmatrix<2, true>, ""};
  t["ldmatrix.x4"] = {ldmatrix<4, false>, ""}, t["ldmatrix.x4.trans"] = {ldmatrix<4, true>, ""};
  t["shfl.up"] = {shfl<Shuffle::up>, ""}, t["shfl.down"] = {shfl<Shuffle::down>, ""};
  t["shfl.bfly"] = {shfl<Shuffle::bfly>, ""}, t["shfl.idx"] = {shfl<Shuffle::idx>, ""};
  t["redux.add.s32"] = {redux<uint32_t, sum>, ""};
  t["redux.min.s32"] = {redux<int32_t, least>, ""};
  t["redux.max.s32"] = {redux<int32_t, most>, ""};
  t["pack"] = {pack, ""}, t["unpack"] = {unpack, ""};
}

}  // namespace ptx
