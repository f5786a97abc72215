#include "plan.h"

#include <algorithm>
#include <numeric>

namespace bitkernels::network {
namespace {

int64_t aligned(int64_t bytes) { return (bytes + kSlack + kAlign - 1) / kAlign * kAlign; }

}  // namespace

void place(Plan& plan) {
  auto& buffers = plan.buffers;
  for (size_t i = 0; i < plan.steps.size(); ++i)
    for (const auto* list : {&plan.steps[i].reads, &plan.steps[i].writes})
      for (int b : *list) {
        Buffer& buffer = buffers[static_cast<size_t>(b)];
        if (buffer.first < 0) buffer.first = static_cast<int>(i);
        buffer.last = static_cast<int>(i);
      }

  // Buffers that share memory because a step writes over its operand: `home` is the first of them.
  std::vector<int> home(buffers.size());
  std::iota(home.begin(), home.end(), 0);
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    if (step.in_place < 0) continue;
    Buffer& from = buffers[static_cast<size_t>(step.in_place)];
    Buffer& to = buffers[static_cast<size_t>(step.writes[0])];
    if (from.kind != Buffer::kArena || to.kind != Buffer::kArena || from.bytes != to.bytes ||
        from.last != static_cast<int>(i) || to.first != static_cast<int>(i))
      continue;
    const int first = home[static_cast<size_t>(step.in_place)];
    home[static_cast<size_t>(step.writes[0])] = first;
    buffers[static_cast<size_t>(first)].last =
        std::max(buffers[static_cast<size_t>(first)].last, to.last);
  }

  // The largest first, each at the lowest offset where it meets no other of its time.
  std::vector<int> order, placed;
  for (size_t i = 0; i < buffers.size(); ++i)
    if (buffers[i].kind == Buffer::kArena && buffers[i].first >= 0 &&
        home[i] == static_cast<int>(i))
      order.push_back(static_cast<int>(i));
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return buffers[static_cast<size_t>(a)].bytes > buffers[static_cast<size_t>(b)].bytes;
  });
  for (int b : order) {
    Buffer& buffer = buffers[static_cast<size_t>(b)];
    int64_t offset = 0, best = -1, best_gap = 0;
    for (int p : placed) {  // by offset
      const Buffer& other = buffers[static_cast<size_t>(p)];
      if (other.last < buffer.first || other.first > buffer.last) continue;
      const int64_t gap = other.offset - offset;
      if (gap >= aligned(buffer.bytes) && (best < 0 || gap < best_gap)) {
        best = offset;
        best_gap = gap;
      }
      offset = std::max(offset, other.offset + aligned(other.bytes));
    }
    buffer.offset = best >= 0 ? best : offset;
    plan.arena_bytes = std::max(plan.arena_bytes, plus(buffer.offset, aligned(buffer.bytes)));
    placed.insert(std::upper_bound(placed.begin(), placed.end(), b,
                                   [&](int x, int y) {
                                     return buffers[static_cast<size_t>(x)].offset <
                                            buffers[static_cast<size_t>(y)].offset;
                                   }),
                  b);
  }
  for (size_t i = 0; i < buffers.size(); ++i)
    buffers[i].offset = buffers[static_cast<size_t>(home[i])].offset;
  if (plan.arena_bytes > kMostBytes) fail("activations of ", plan.arena_bytes, " bytes");
}

std::unique_ptr<Arena> Plan::take() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      std::unique_ptr<Arena> arena = std::move(idle_.back());
      idle_.pop_back();
      return arena;
    }
    idle_.reserve(idle_.capacity() + 1);  // so that giving back allocates nothing
  }
  auto arena = std::make_unique<Arena>();
  arena->memory = allocate(arena_bytes);
  for (const Buffer& b : buffers)
    arena->address.push_back(b.kind == Buffer::kArena ? arena->memory.get() + b.offset
                             : b.kind == Buffer::kConstant
                                 ? const_cast<char*>(static_cast<const char*>(b.data))
                                 : nullptr);
  return arena;
}

void Plan::give(std::unique_ptr<Arena> arena) {
  std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(arena));
}

}  // namespace bitkernels::network
