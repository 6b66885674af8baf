// Runs a program that program.py has read, block by block, and says what it did wrong.
#include "arithmetic.h"
#include "matrices.h"
#include "memory.h"
#include "moves.h"

namespace {

using namespace ptx;

const Table& table() {
  static const Table all = [] {
    Table t;
    integers(t), bits(t), floats(t), comparisons(t), conversions(t), moves(t), matrices(t);
    return t;
  }();
  return all;
}

enum Kind : int32_t { PLAIN, BRANCH, RETURN, BARRIER };  // as in program.py

constexpr uint64_t ENDLESS = 100'000'000;  // instructions of one warp

}  // namespace

extern "C" {

struct Instruction {
  int32_t kind;
  uint32_t guard;  // register of the predicate, or ~0
  int32_t negated;
  uint32_t operands;  // the first; of a branch its target
  Handler run;
  const char* text;
};

struct Program {
  const Instruction* code;
  uint32_t count;
  const uint32_t* operands;
  const char* registers;               // as they are at the start: constants and arguments
  uint32_t size;                       // bytes of them
  uint32_t thread, block[3], grid[3];  // registers of %tid.x, %ctaid and %nctaid
};

struct Tensor {
  uint64_t base, size;
  char* data;
};

const char* ptx_sizes(const char* name) {
  const auto found = table().find(name);
  return found == table().end() ? nullptr : found->second.sizes.c_str();
}

Handler ptx_handler(const char* name) { return table().at(name).run; }
}

namespace {

void fill(Warp& w, uint32_t offset, uint32_t value, uint32_t step = 0) {
  for (int l = 0; l < LANES; ++l) w.at<uint32_t>(offset)[l] = value + step * l;
}

// Until the warp meets a barrier (true) or has returned (false).
bool run(const Program& p, Warp& w, uint64_t& steps) {
  while (w.pc < p.count) {
    const Instruction& i = p.code[w.pc++];
    if (++steps > ENDLESS) throw Fault("does not end");
    Mask m = ALL;
    if (i.guard != ~0u) {
      m = 0;
      for (int l = 0; l < LANES; ++l) m |= Mask(w.at<bool>(i.guard)[l] != bool(i.negated)) << l;
    }
    try {
      if (i.kind == PLAIN) {
        if (m) i.run(w, p.operands + i.operands, m);
        continue;
      }
      if (m == 0) continue;
      together(m, "a jump or barrier");
    } catch (const Fault& fault) {
      throw Fault(std::string(fault.what()) + ": " + i.text + " (warp " + std::to_string(w.index) +
                  ")");
    }
    if (i.kind == BRANCH) w.pc = i.operands;
    if (i.kind == RETURN) return false;
    if (i.kind == BARRIER) return true;
  }
  return false;
}

uint64_t run(const Program& p, Block& block, int warps, const uint32_t* at, const uint32_t* grid,
             bool reverse) {
  std::vector<Warp> all(warps);
  for (int i = 0; i < warps; ++i) {
    Warp& w = all[i];
    w.block = &block, w.index = i;
    w.file.assign(p.registers, p.registers + p.size);
    fill(w, p.thread, 32 * i, 1);
    for (int d = 0; d < 3; ++d) fill(w, p.block[d], at[d]), fill(w, p.grid[d], grid[d]);
  }
  uint64_t most = 0;
  std::vector<uint64_t> steps(warps);
  std::vector<bool> runs(warps, true);
  for (int waiting = 1; waiting; ++block.epoch) {
    waiting = 0;
    for (int k = 0; k < warps; ++k) {
      const int i = reverse ? warps - 1 - k : k;
      if (runs[i]) runs[i] = run(p, all[i], steps[i]);
      waiting += runs[i];
    }
    if (waiting && waiting < warps)
      throw Fault("some warps wait at a barrier that others have passed by");
  }
  for (Warp& w : all)
    for (const auto& group : w.groups)
      if (!group.empty() || !w.open.empty()) throw Fault("ends before cp.async has");
  for (uint64_t x : steps) most = std::max(most, x);
  return most;
}

}  // namespace

extern "C" {

// "" or what went wrong, in `said`. steps: instructions of the warp that ran most.
void ptx_run(const Program* p, const uint32_t* grid, int warps, uint32_t shared,
             const Tensor* tensors, int count, int reverse, uint64_t* steps, char* said, int most) {
  Launch launch;
  for (int i = 0; i < count; ++i)
    launch.global.emplace_back(tensors[i].base, tensors[i].size, tensors[i].data);
  const uint32_t total = grid[0] * grid[1] * grid[2];
  *said = 0, *steps = 0;
  for (uint32_t k = 0; k < total; ++k) {
    const uint32_t i = reverse ? total - 1 - k : k;
    const uint32_t at[3] = {i % grid[0], i / grid[0] % grid[1], i / grid[0] / grid[1]};
    try {
      Block block(launch, i, shared);
      *steps = std::max(*steps, run(*p, block, warps, at, grid, reverse));
    } catch (const Fault& fault) {
      std::snprintf(said, most, "block (%u, %u, %u): %s", at[0], at[1], at[2], fault.what());
      return;
    }
  }
}
}
