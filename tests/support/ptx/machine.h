// A multiprocessor that runs PTX on a CPU: warps of 32 lanes, registers, and what an instruction is.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

namespace ptx {

constexpr int LANES = 32;
using Mask = uint32_t;  // which lanes an instruction is for
constexpr Mask ALL = ~Mask(0);

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Block;

struct Copy {  // what cp.async brings: `size` bytes of shared memory, the first `real` from `from`
  uint32_t to, size, real;
  uint64_t from;
};

struct Warp {
  Block* block;
  int index;
  std::vector<char> file;  // registers, one after the other: 32 lanes of 1, 2, 4 or 8 bytes
  uint32_t pc = 0;
  std::vector<Copy> open;                 // copies of no group yet
  std::vector<std::vector<Copy>> groups;  // committed, oldest first

  template <class T>
  T* at(uint32_t offset) {
    return reinterpret_cast<T*>(file.data() + offset);
  }
};

// o: offsets of registers (and plain numbers), destination first.
using Handler = void (*)(Warp& w, const uint32_t* o, Mask m);

struct Operation {
  Handler run;
  std::string sizes;  // bytes of each register: "444"; "" where the reader knows the form
};

using Table = std::unordered_map<std::string, Operation>;

template <class F, class D, class... S>
void lanes(Warp& w, const uint32_t* o, Mask m) {
  D* d = w.at<D>(*o);
  [&]<size_t... k>(std::index_sequence<k...>) {
    const std::tuple s{w.at<const S>(o[k + 1])...};
    if (m == ALL) {
      for (int l = 0; l < LANES; ++l) d[l] = F{}(std::get<k>(s)[l]...);
    } else {
      for (int l = 0; l < LANES; ++l)
        if (m >> l & 1) d[l] = F{}(std::get<k>(s)[l]...);
    }
  }(std::index_sequence_for<S...>{});
}

// d = f(s…), lane by lane
template <class D, class... S, class F>
Operation each(F) {
  std::string sizes(1, char('0' + sizeof(D)));
  (sizes.push_back(char('0' + sizeof(S))), ...);
  return {lanes<F, D, S...>, sizes};
}

inline void together(Mask m, const char* what) {
  if (m != ALL) throw Fault(std::string(what) + " by a part of the warp");
}

}  // namespace ptx
