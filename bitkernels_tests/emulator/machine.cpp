#include "machine.h"

#include <setjmp.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <array>

namespace emulator {

Machine machine;

namespace {

constexpr size_t STACK = 256 * 1024;
constexpr int GUARD = 4096;

struct Fiber {
  ucontext_t start;
  jmp_buf here;
  bool started;
};

std::vector<Fiber> fibers;
unsigned char* stacks;
unsigned char* shared_pages;
jmp_buf scheduler;
const std::function<void()>* body;

void enter() {
  (*body)();
  machine.finished[machine.current] = true;
  _longjmp(scheduler, 1);
}

void resume(int thread) {
  machine.current = thread;
  if (_setjmp(scheduler)) return;
  Fiber& fiber = fibers[thread];
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = stacks + thread * STACK;
  fiber.start.uc_stack.ss_size = STACK;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

int popcount_and(const unsigned char* a, const unsigned char* b, int bytes) {
  int count = 0;
  for (int i = 0; i < bytes; i += 4) {
    uint32_t x, y;
    memcpy(&x, a + i, 4);
    memcpy(&y, b + i, 4);
    count += __builtin_popcount(x & y);
  }
  return count;
}

}  // namespace

void Machine::fail(const std::string& what) {
  error = "block " + std::to_string(block) + ", thread " + std::to_string(current) + ": " + what;
  _longjmp(scheduler, 1);
}

void Machine::wait(Queue& queue) {
  queue.push_back(current);
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

void Machine::wake(Queue& queue) {
  for (int thread : queue) ready.push_back(thread);
  queue.clear();
}

void Machine::pause() {
  ready.push_back(current);
  if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

bool Machine::arrive(Meeting& meeting, int count, int kind, const std::function<void()>& action) {
  if (meeting.arrived > 0 && meeting.kind != kind) fail("threads met at different instructions");
  meeting.kind = kind;
  if (++meeting.arrived < count) return false;
  meeting.arrived = 0;
  action();
  wake(meeting.waiting);
  return true;
}

void Machine::meet(Meeting& meeting, int count, int kind, const std::function<void()>& action) {
  if (!arrive(meeting, count, kind, action)) wait(meeting.waiting);
}

void Machine::whole_warp(int kind) {
  meet(warps[current / 32], 32, kind, [] {});
}

void Machine::bar(int id, int count, int kind, bool waits, const std::function<void()>& action) {
  if (id < 0 || id >= static_cast<int>(named.size())) fail("there is no such barrier");
  if (count % 32 || count > threads) fail("a barrier counts whole warps of the block");
  NamedBarrier& barrier = named[id];
  if (barrier.count >= 0 && barrier.count != count) fail("threads expect other counts there");
  if (barrier.there[current]) fail("a thread comes to a barrier twice before others come");
  barrier.count = count;
  barrier.there[current] = true;
  const bool last = arrive(barrier, count ? count : threads, kind, [&] {
    const std::bitset<MAX_THREADS> lanes(0xFFFFFFFFu);
    for (int first = 0; first < threads; first += 32) {
      const size_t came = (barrier.there >> first & lanes).count();
      if (came != 0 && came != 32) fail("half a warp comes to a barrier");
    }
    barrier.there.reset();
    action();
  });
  if (waits && !last) wait(barrier.waiting);
}

unsigned char* Machine::at(uint32_t address, int bytes) {
  if (address < SHARED_BASE || address + bytes > SHARED_BASE + shared_bytes) {
    fail("shared address " + std::to_string(address) + " is outside");
  }
  if (address % (bytes < 16 ? bytes : 16)) fail("misaligned shared address");
  return shared + (address - SHARED_BASE);
}

void Machine::check(const void* p, int bytes, bool write) {
  const uint64_t begin = reinterpret_cast<uint64_t>(p);
  if (begin % (bytes < 16 ? bytes : 16)) fail("misaligned global address");
  for (const Range& r : ranges) {
    if (begin < r.begin || begin + bytes > r.end || (write && !r.writable)) continue;
    if (r.late && !depended[current]) fail("a load of what the kernel before may not have written");
    return;
  }
  fail(write ? "a store outside the tensors" : "a load outside the tensors");
}

void Machine::finish_copy(Copy& copy) {
  if (copy.done) return;
  copy.done = true;
  memcpy(at(copy.to, copy.bytes), copy.data, copy.bytes);
  own(copy.to, copy.bytes);
}

void Machine::own(uint32_t address, int bytes) {
  for (int i = 0; i < bytes; ++i) unfenced[address - SHARED_BASE + i] = current + 1;
}

void Machine::complete(Barrier& barrier) {
  if (barrier.pending < 0) fail("more arrivals at an mbarrier than it expects");
  if (barrier.pending > 0 || barrier.transactions != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  wake(barrier.waiting);
}

// A K-major operand in 128-byte swizzle, by the PTX manual: atoms of 8 rows of 128 bytes follow
// each other at the descriptor's stride; the 16-byte pieces of an address (bits 4 to 6) are xored
// with bits 7 to 9 of the same address.
static const unsigned char* operand_row(Machine& m, uint64_t descriptor, int row,
                                        unsigned char (&line)[32]) {
  if ((descriptor >> 62) != 1) m.fail("the model knows descriptors of 128-byte swizzle only");
  if ((descriptor >> 49) & 7) m.fail("the model knows base offset 0 only");
  const uint32_t start = (descriptor & 0x3FFF) << 4;
  const uint32_t stride = ((descriptor >> 32) & 0x3FFF) << 4;
  for (int piece = 0; piece < 2; ++piece) {
    uint32_t address = start + row / 8 * stride + row % 8 * 128 + piece * 16;
    address ^= (address >> 7 & 7) << 4;
    memcpy(line + 16 * piece, m.at(address, 16), 16);
    for (int i = 0; i < 16; ++i) {
      if (m.unfenced[address - SHARED_BASE + i]) {
        m.fail("wgmma reads what was written without fence.proxy.async");
      }
    }
  }
  return line;
}

void Machine::run_product(Warpgroup& group) {
  const Product product = group.products.front().second;
  group.products.pop_front();
  static unsigned char a[64][32], b[256][32];
  for (int row = 0; row < 64; ++row) {
    // In registers a is read when the product happens, as the hardware may.
    if (product.fragments[0]) {
      for (int word = 0; word < 8; ++word) {
        const uint32_t* const lane = product.fragments[row / 16 * 32 + row % 8 * 4 + word % 4];
        memcpy(a[row] + 4 * word, lane + row % 16 / 8 + word / 4 * 2, 4);
      }
    } else {
      operand_row(*this, product.a, row, a[row]);
    }
  }
  for (int row = 0; row < product.columns; ++row) operand_row(*this, product.b, row, b[row]);
  for (int row = 0; row < 64; ++row) {
    for (int column = 0; column < product.columns; ++column) {
      // Warp row / 16 holds the row; inside it, as the fragment of mma.sync.
      const int lane = row % 8 * 4 + column % 8 / 2;
      const int reg = column / 8 * 4 + (row % 16 / 8) * 2 + column % 2;
      int& d = product.d[row / 16 * 32 + lane][reg];
      d = (product.accumulate ? d : 0) + popcount_and(a[row], b[column], 32);
    }
  }
}

std::string Machine::run(int grid, int block_threads, int shared_size, int seed,
                         const std::function<void()>& kernel) {
  if (block_threads > MAX_THREADS || block_threads % 32) return "bad number of threads";
  if (shared_size > SHARED_LIMIT) return "more shared memory than there is";
  if (!stacks) {
    stacks = static_cast<unsigned char*>(mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE,
                                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    shared_pages = static_cast<unsigned char*>(aligned_alloc(1024, SHARED_LIMIT + GUARD + 1024));
  }
  body = &kernel;
  blocks = grid;
  threads = block_threads;
  shared_bytes = shared_size;
  shared = shared_pages;
  random.seed(seed);
  order = seed % 3;
  lazy = seed % 2;
  late = seed % 5 == 4;
  error.clear();
  for (block = 0; block < grid && error.empty(); ++block) {
    for (int i = 0; i < shared_size + GUARD; ++i) shared[i] = 0xA5 ^ (i >> 3);
    fibers.assign(threads, Fiber{});
    finished.assign(threads, false);
    depended.assign(threads, false);
    ready.clear();
    for (int i = 0; i < threads; ++i) ready.push_back(i);
    in_flight.clear();
    pool = 0;
    pool_waiting.clear();
    barriers.clear();
    warps.assign(threads / 32, {});
    named.assign(16, {});
    any = false;
    warpgroups.assign((threads + 127) / 128, {});
    lane_in.assign(threads / 32, {});
    lane_out.assign(threads / 32, {});
    fragments.assign(threads / 32, {});
    accumulators.assign(threads / 32, {});
    groups.assign(threads, std::deque<std::vector<Copy>>(1));
    unfenced.assign(shared_size, 0);
    waited.assign(threads, {});
    int left = threads;
    while (left > 0 && error.empty()) {
      if (!in_flight.empty() && (ready.empty() || !late && chance(lazy ? 2 : 16))) {
        const size_t i = random() % in_flight.size();
        const auto action = in_flight[i];
        in_flight.erase(in_flight.begin() + i);
        if (!_setjmp(scheduler)) action();
        continue;
      }
      if (ready.empty()) {
        error = "block " + std::to_string(block) + ": deadlock, " + std::to_string(left) +
                " threads wait";
        break;
      }
      for (Warpgroup& group : warpgroups) {
        if (!lazy && !group.products.empty() && chance(64)) {
          if (!_setjmp(scheduler)) run_product(group);
        }
      }
      if (order == 0) std::swap(ready.front(), ready[random() % ready.size()]);
      const int next = order == 1 ? ready.back() : ready.front();
      order == 1 ? ready.pop_back() : ready.pop_front();
      resume(next);
      left -= finished[next];
    }
    for (const Warpgroup& group : warpgroups) {
      if (error.empty() && !group.products.empty()) error = "a wgmma that nothing waited for";
    }
    for (const NamedBarrier& barrier : named) {
      if (error.empty() && barrier.arrived) error = "arrivals at a barrier where nobody waits";
    }
    if (error.empty() && !in_flight.empty()) error = "a bulk copy that nothing waited for";
    for (const auto& [at, barrier] : barriers) {
      if (error.empty() && barrier.transactions) error = "an mbarrier that expects other bytes";
    }
    for (int i = shared_size; i < shared_size + GUARD && error.empty(); ++i) {
      if (shared[i] != static_cast<unsigned char>(0xA5 ^ (i >> 3))) error = "shared memory overrun";
    }
  }
  return error;
}

}  // namespace emulator
