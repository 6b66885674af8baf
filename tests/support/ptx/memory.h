// Memory that knows who touched each byte last: bounds, alignment, and races between warps.
#pragma once
#include <algorithm>

#include "machine.h"

namespace ptx {

// Of a block of the grid one warp, between two of its barriers.
struct Who {
  uint32_t id;     // 64 · block + warp + 1
  uint32_t epoch;  // barriers of the block before
};

constexpr uint32_t SEVERAL = 64;  // id - id % 64 + 64 … never a warp's: a block has 62 at most
constexpr uint32_t ANY = ~uint32_t(0);  // warps of several blocks

inline uint32_t block_of(uint32_t id) { return (id - 1) / SEVERAL; }

struct Cell {
  uint32_t writer = 0, written = 0;  // id and epoch; 0: nobody
  uint32_t reader = 0, read = 0;
  bool flying = false;  // cp.async has not brought it yet
};

class Region {
 public:
  Region(uint64_t base, size_t size, char* data) : base(base), data(data), cells(size) {}

  bool holds(uint64_t at, uint32_t n) const {
    return at >= base && n <= cells.size() && at - base <= cells.size() - n;
  }

  const char* read(uint64_t at, uint32_t n, Who who) {
    const uint64_t first = at - base;
    for (uint64_t i = first; i < first + n; ++i) {
      Cell& c = cells[i];
      if (c.flying) fail("reads what cp.async has not brought", at);
      if (!before(c.writer, c.written, who)) fail("race: reads what another warp wrote", at);
      if (!c.reader || (c.reader != ANY && block_of(c.reader) == block_of(who.id) &&
                        (c.read < who.epoch || c.reader == who.id)))
        c.reader = who.id;
      else if (c.reader != ANY && block_of(c.reader) == block_of(who.id))
        c.reader = block_of(who.id) * SEVERAL + SEVERAL;
      else
        c.reader = ANY;
      c.read = who.epoch;
    }
    return data + first;
  }

  // Equal bytes may be written twice: where a layout repeats values, several warps hold them.
  void write(uint64_t at, uint32_t n, Who who, const char* values) {
    const uint64_t first = at - base;
    for (uint64_t i = first; i < first + n; ++i) {
      Cell& c = cells[i];
      if (c.flying) fail("writes where cp.async still brings something", at);
      if (data[i] != values[i - first]) own(c, who, at);
      c.writer = who.id, c.written = who.epoch;
      data[i] = values[i - first];
    }
  }

  // From here to `land` nobody may touch these bytes.
  void fly(uint64_t at, uint32_t n, Who who) {
    for (uint64_t i = at - base; i < at - base + n; ++i) {
      own(cells[i], who, at);
      cells[i].flying = true;
      data[i] = char(0xFF);
    }
  }

  void land(uint64_t at, uint32_t n, Who who, const char* values) {
    for (uint64_t i = at - base; i < at - base + n; ++i) cells[i].flying = false;
    write(at, n, who, values);
  }

  uint64_t base;

 private:
  static bool before(uint32_t id, uint32_t epoch, Who who) {
    if (id == 0 || id == who.id) return true;
    return id != ANY && block_of(id) == block_of(who.id) && epoch < who.epoch;
  }

  static void own(const Cell& c, Who who, uint64_t at) {
    if (!before(c.writer, c.written, who)) fail("race: writes what another warp wrote", at);
    if (!before(c.reader, c.read, who)) fail("race: writes what another warp reads", at);
  }

  [[noreturn]] static void fail(const char* what, uint64_t at) {
    char text[128];
    std::snprintf(text, sizeof text, "%s, at 0x%llx", what, (unsigned long long)at);
    throw Fault(text);
  }

  char* data;
  std::vector<Cell> cells;
};

struct Launch {
  std::vector<Region> global;

  Region& find(uint64_t at, uint32_t n) {
    auto found =
        std::find_if(global.begin(), global.end(), [&](const Region& r) { return r.holds(at, n); });
    if (found == global.end()) {
      char text[96];
      std::snprintf(text, sizeof text, "%u bytes outside of every tensor, at 0x%llx", n,
                    (unsigned long long)at);
      throw Fault(text);
    }
    return *found;
  }
};

struct Block {
  Launch& launch;
  uint32_t index;
  std::vector<char> bytes;
  Region shared;
  uint32_t epoch = 1;

  // Shared memory starts as NaN, in every format.
  Block(Launch& launch, uint32_t index, uint32_t size)
      : launch(launch), index(index), bytes(size, char(0xFF)), shared(0, size, bytes.data()) {}

  Who who(const Warp& w) const { return {index * SEVERAL + uint32_t(w.index) + 1, epoch}; }

  Region& find(bool is_shared, uint64_t at, uint32_t n) {
    if (at % n) throw Fault("misaligned: " + std::to_string(n) + " bytes at " + std::to_string(at));
    if (!is_shared) return launch.find(at, n);
    if (!shared.holds(at, n))
      throw Fault("outside of shared memory: " + std::to_string(at) + " + " + std::to_string(n) +
                  " of " + std::to_string(bytes.size()));
    return shared;
  }
};

}  // namespace ptx
