// One thread block on the host: every CUDA thread is a fiber, all run on one CPU thread.
//
// A fiber runs until it waits: for the other lanes of a warp or warpgroup, at a barrier, or for an
// asynchronous copy. Then the scheduler takes another one at random, or lets some asynchronous
// operation happen. Everything that the hardware may delay is delayed at random, up to the moment
// where the program waits for it; so a missing wait or barrier shows as a wrong result, a wrong
// count as a deadlock, which is reported. The model is sequentially consistent.
#pragma once
#include <array>
#include <bitset>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <string>
#include <vector>

namespace emulator {

constexpr uint32_t SHARED_BASE = 1024;  // where dynamic shared memory starts in its window
constexpr int SHARED_LIMIT = 227 * 1024;
constexpr int MAX_THREADS = 1024;

using Queue = std::vector<int>;  // threads that wait

// A place where `count` threads meet. The last one runs the action, then all go on.
struct Meeting {
  int arrived = 0;
  int kind = 0;
  Queue waiting;
};

struct NamedBarrier : Meeting {
  int count = -1;                  // that all who come there expect, for the whole kernel
  std::bitset<MAX_THREADS> there;  // of them nobody comes twice
};

struct Range {
  uint64_t begin, end;
  bool writable;
  bool late;  // written by the kernel before, which this one was launched to overlap with
};

struct Copy {
  uint32_t to;
  int bytes;
  bool done;
  unsigned char data[16];
};

struct Product {  // one wgmma
  int columns;
  uint64_t a, b;
  bool accumulate;
  int* d[128];
  const uint32_t* fragments[128];  // of a, where it is in registers
};

struct Warpgroup {
  Meeting meeting;
  std::deque<std::pair<int, Product>> products;  // with the number of their group
  int group = 0;
  bool fenced = false;
  int* d[128];
  const uint32_t* fragments[128];
};

struct Barrier {
  int expected, pending, phase = 0;
  long transactions = 0;
  Queue waiting;
};

struct Machine {
  // The launch.
  int block, blocks, threads, shared_bytes;
  std::vector<Range> ranges;
  unsigned char* shared = nullptr;

  // The block that runs.
  int current;
  std::mt19937 random;
  bool lazy;  // products wait until they must happen, bulk copies do not wait
  bool late;  // bulk copies wait until nobody can go on without them
  int order;  // 0: random, 1: the latest ready thread first, 2: the earliest
  std::deque<int> ready;
  std::vector<bool> finished;
  std::vector<bool> depended;                    // the thread has waited for the kernel before
  std::vector<std::function<void()>> in_flight;  // bulk copies
  std::map<uint32_t, Barrier> barriers;
  std::vector<Meeting> warps;
  std::vector<NamedBarrier> named;
  bool any, found_any;  // what threads said at a barrier, so far and at the last one
  std::vector<Warpgroup> warpgroups;
  std::vector<std::array<uint32_t, 32>> lane_in, lane_out;
  std::vector<std::array<std::array<uint32_t, 6>, 32>> fragments;
  std::vector<std::array<int*, 32>> accumulators;
  std::vector<std::deque<std::vector<Copy>>> groups;  // cp.async of each thread, the last is open
  std::vector<uint16_t> unfenced;                     // of each byte: thread + 1 that wrote it
  std::vector<std::vector<std::pair<uint32_t, int>>> waited;  // ranges that a fence will publish
  int pool;  // registers that threads gave up, less those that others took
  Queue pool_waiting;
  std::string error;

  int launched_registers() const { return 65536 / threads / 8 * 8; }
  [[noreturn]] void fail(const std::string& what);
  void wait(Queue& queue);
  void wake(Queue& queue);
  void pause();  // lets others run
  // Whether the current thread is the last one.
  bool arrive(Meeting& meeting, int count, int kind, const std::function<void()>& action);
  void meet(Meeting& meeting, int count, int kind, const std::function<void()>& action);
  void whole_warp(int kind);  // all lanes come here, and to the same
  // At a barrier of the block, by whole warps: `count` threads, or all if it is 0.
  void bar(int id, int count, int kind, bool waits, const std::function<void()>& action);
  bool chance(int one_in) { return random() % one_in == 0; }

  unsigned char* at(uint32_t address, int bytes);
  void check(const void* p, int bytes, bool write);
  void finish_copy(Copy& copy);
  void own(uint32_t address, int bytes);  // written by the current thread, not yet fenced
  void run_product(Warpgroup& group);
  void complete(Barrier& barrier);
  std::string run(int grid, int block_threads, int shared_size, int seed,
                  const std::function<void()>& kernel);
};

extern Machine machine;

}  // namespace emulator
