// A network for given sizes of its inputs: steps, and where in memory their operands lie.
#pragma once
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "cpu/kernels.h"
#include "values.h"

namespace bitkernels::network {

constexpr int64_t kAlign = 64;   // of every buffer
constexpr int64_t kSlack = 128;  // bytes behind each that may be read: vectors of the kernels

struct Free {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(kAlign)); }
};
using Memory = std::unique_ptr<char, Free>;
inline Memory allocate(int64_t bytes) {
  const auto size = static_cast<size_t>(bytes + kSlack);
  return Memory(static_cast<char*>(::operator new(size, std::align_val_t(kAlign))));
}

struct Buffer {
  enum Kind { kArena, kConstant, kInput, kOutput };
  Kind kind;
  int64_t bytes = 0;
  int index = 0;               // of an input or output
  const void* data = nullptr;  // of a constant
  int64_t offset = 0;          // in the arena
  int first = -1, last = -1;   // steps that touch it
};

// The buffers' addresses in one run.
struct Frame {
  char* const* address;

  template <class T>
  T* at(Where w) const {
    return reinterpret_cast<T*>(address[w.buffer] + w.offset);
  }
};

struct Step {
  const char *name, *call, *weight;  // live as long as the network
  std::vector<int> reads, writes;
  int in_place = -1;  // the buffer that is read and may be written over by writes[0]
  std::function<void(const Frame&)> run;
};

// What one run needs for itself.
struct Arena {
  Memory memory;
  std::vector<char*> address;  // of all buffers
};

struct Plan {
  std::vector<View> inputs;  // their sizes and strides
  std::vector<View> outputs;
  std::vector<Buffer> buffers;
  std::vector<Step> steps;
  int64_t arena_bytes = 0;

  // An arena of its own until it is given back.
  std::unique_ptr<Arena> take();
  void give(std::unique_ptr<Arena> arena);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Arena>> idle_;
};

// Lifetimes, steps that may write over what they read last, and offsets of all buffers.
void place(Plan& plan);

}  // namespace bitkernels::network
