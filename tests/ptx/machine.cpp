// A machine that runs PTX, assembled by assembler.py, on the memory of this process.
//
// Thread after thread, as far as our kernels let it: threads share no memory and no barrier, and
// only at a `shfl` does a warp meet. Every access is checked: it must be aligned and lie in one of
// the ranges of the launch.

#include "operations.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string_view>
#include <vector>

namespace ptx {
namespace {

constexpr int warp = 32;

struct Instruction {
  int32_t op;
  int32_t guard, negated;  // a predicate's slot or -1, and whether it must be false
  int32_t d, a, b, c;      // slots; see `Special` for the operations that read them otherwise
  int64_t value;
};

struct Range {
  uint64_t begin, end, writable;
};

#define NAME(name, result) name,
constexpr std::string_view names[] = {OPERATIONS(NAME)};
constexpr int count = static_cast<int>(std::size(names));

constexpr int number_of(std::string_view name) {
  for (int i = 0; i < count; ++i) {
    if (names[i] == name) return i;
  }
  throw "no such operation";
}

// The first five: value, bytes from the address in a or from the first parameter; b, bytes of an
// element; c, how many; d, where in the lists of slots theirs begin. A branch's value is where to.
// `shfl`: c has the clamp's slot, value that of the mask.
enum Special { load = count, store, parameter, unpack, pack, branch, leave, shuffle };
constexpr const char* special_names[] = {"ld",   "st",  "ld.param", "unpack",
                                         "pack", "bra", "ret",      "shfl.sync.idx.b32"};

// ---- threads -----------------------------------------------------------------------------------

struct Launch {
  const Instruction* code;
  const int32_t* lists;  // slots
  const uint8_t* parameters;
  const Range* ranges;  // by address
  int32_t range_count;
  int64_t most;  // instructions that a thread may take
};

uint64_t read(uint64_t address, int bytes) {
  uint64_t x = 0;
  std::memcpy(&x, reinterpret_cast<const void*>(address), static_cast<size_t>(bytes));
  return x;
}

void check(const Launch& launch, uint64_t address, uint64_t bytes, bool writes) {
  if (address % bytes != 0) throw std::runtime_error("misaligned");
  int low = 0, high = launch.range_count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (launch.ranges[middle].begin <= address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  const uint64_t end = low == 0 ? 0 : launch.ranges[low - 1].end;
  if (address >= end || end - address < bytes) throw std::runtime_error("out of bounds");
  if (writes && launch.ranges[low - 1].writable == 0) throw std::runtime_error("read-only");
}

struct Thread {
  std::vector<uint64_t> slots;
  int pc;

  void access(const Launch& launch, const Instruction& i, bool writes) {
    uint64_t address = slots[i.a] + static_cast<uint64_t>(i.value);
    check(launch, address, static_cast<uint64_t>(i.b) * i.c, writes);
    for (int n = 0; n < i.c; ++n, address += i.b) {
      uint64_t& slot = slots[launch.lists[i.d + n]];
      if (writes) {
        std::memcpy(reinterpret_cast<void*>(address), &slot, i.b);
      } else {
        slot = read(address, i.b);
      }
    }
  }

  // Until it ends or comes to a `shfl`; how many instructions that took.
  int64_t run(const Launch& launch) {
    uint64_t* const r = slots.data();
    const auto u16 = [r](int slot) { return static_cast<uint16_t>(r[slot]); };
    const auto u32 = [r](int slot) { return static_cast<uint32_t>(r[slot]); };
    const auto u64 = [r](int slot) { return r[slot]; };
    const auto s32 = [r](int slot) { return static_cast<int32_t>(r[slot]); };
    const auto s64 = [r](int slot) { return static_cast<int64_t>(r[slot]); };
    const auto p = [r](int slot) { return (r[slot] & 1) != 0; };
    const auto f = [r](int slot) { return std::bit_cast<float>(static_cast<uint32_t>(r[slot])); };
    const auto g = [r](int slot) {
      return std::bit_cast<float>(static_cast<uint32_t>(r[slot] >> 32));
    };
    for (int64_t taken = 1;; ++taken) {
      const Instruction& i = launch.code[pc];
      if (taken > launch.most) throw std::runtime_error("no end in sight");
      if (i.guard >= 0 && p(i.guard) == (i.negated != 0)) {
        ++pc;
        continue;
      }
      switch (i.op) {
#define CASE(name, result)                                                   \
  case number_of(name): {                                                    \
    [[maybe_unused]] const int a = i.a, b = i.b, c = i.c;                    \
    r[i.d] = held(result);                                                   \
    break;                                                                   \
  }
        OPERATIONS(CASE)
        case load:
          access(launch, i, false);
          break;
        case store:
          access(launch, i, true);
          break;
        case parameter:
          for (int n = 0; n < i.c; ++n) {
            const auto from = reinterpret_cast<uint64_t>(launch.parameters + i.value);
            r[launch.lists[i.d + n]] = read(from + static_cast<uint64_t>(n) * i.b, i.b);
          }
          break;
        case unpack:
          for (int n = 0; n < i.c; ++n) {
            r[launch.lists[i.d + n]] = field(r[i.a], 8 * i.b * n, 8 * i.b);
          }
          break;
        case pack: {
          uint64_t made = 0;
          for (int n = 0; n < i.c; ++n) {
            made |= field(r[launch.lists[i.d + n]], 0, 8 * i.b) << 8 * i.b * n;
          }
          r[i.a] = made;
          break;
        }
        case branch:
          pc = static_cast<int>(i.value);
          continue;
        case leave:
        case shuffle:
          return taken;
        default:
          throw std::runtime_error("no such operation");
      }
      ++pc;
    }
  }
};

// All threads of a warp must have come to the same `shfl`.
void exchange(const Instruction* code, std::vector<Thread>& threads) {
  const Instruction& i = code[threads[0].pc];
  uint64_t values[warp];
  for (int lane = 0; lane < warp; ++lane) {
    Thread& thread = threads[lane];
    const bool whole = thread.slots[i.c] == warp - 1 &&
                       static_cast<uint32_t>(thread.slots[i.value]) == 0xFFFFFFFF;
    if (thread.pc != threads[0].pc || !whole) throw std::runtime_error("not by a whole warp");
    values[lane] = thread.slots[i.a];
  }
  for (int lane = 0; lane < warp; ++lane) {
    Thread& thread = threads[lane];
    thread.slots[i.d] = static_cast<uint32_t>(values[thread.slots[i.b] % warp]);
    ++thread.pc;
  }
}

// Special registers of a thread have the first slots, in the assembler's order.
void place(Thread& thread, uint32_t block, uint32_t index, uint32_t blocks, uint32_t block_size) {
  const uint32_t special[] = {index, 0, 0, block, 0, 0, block_size, 1, 1, blocks, 1, 1};
  std::copy(std::begin(special), std::end(special), thread.slots.begin());
  thread.pc = 0;
}

}  // namespace
}  // namespace ptx

// ---- from Python -------------------------------------------------------------------------------

extern "C" const char* ptx_operation(int number) {
  using namespace ptx;
  if (number < count) return names[number].data();
  const int special = number - count;
  return special < static_cast<int>(std::size(special_names)) ? special_names[special] : nullptr;
}

// slots: what they hold at first, of all threads alike. taken: instructions of all of them. Returns
// -1, or the instruction that failed, and why.
extern "C" int ptx_launch(const ptx::Instruction* code, const int32_t* lists, const uint64_t* slots,
                          int32_t slot_count, const uint8_t* parameters, const ptx::Range* ranges,
                          int32_t range_count, uint32_t blocks, uint32_t block_size, int64_t most,
                          int64_t* taken, char* why, size_t why_size) {
  using namespace ptx;
  const Launch launch{code, lists, parameters, ranges, range_count, most};
  std::vector<Thread> threads(warp, Thread{{slots, slots + slot_count}, 0});
  const auto ended = [code](const Thread& thread) { return code[thread.pc].op == leave; };
  const Thread* current = &threads[0];
  try {
    for (uint32_t block = 0; block < blocks; ++block) {
      for (uint32_t first = 0; first < block_size; first += warp) {
        for (uint32_t lane = 0; lane < warp; ++lane) {
          place(threads[lane], block, first + lane, blocks, block_size);
        }
        while (true) {
          for (Thread& thread : threads) {
            current = &thread;
            *taken += thread.run(launch);
          }
          if (std::all_of(threads.begin(), threads.end(), ended)) break;
          exchange(code, threads);
        }
      }
    }
  } catch (const std::exception& error) {
    std::snprintf(why, why_size, "%s", error.what());
    return current->pc;
  }
  return -1;
}
