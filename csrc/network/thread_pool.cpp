// The threads of the stand-alone library, behind cpu/parallel.h. Workers start at the first work
// that is shared, look for more for a moment, then sleep. Work that comes while other work is
// shared out, or from a worker, runs where it is.
#include <sched.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include "cpu/parallel.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bitkernels {
namespace {

constexpr int kSpins = 20000;  // about 50 us before a worker sleeps

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int processors() {
  cpu_set_t set;
  const int n = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  return n > 1 ? n : 1;
}

std::atomic<int> wanted{processors()};
thread_local bool is_worker = false;

struct Work {
  int64_t n = 0, parts = 0;
  void (*body)(int64_t, int64_t, void*) = nullptr;
  void* context = nullptr;
};

class Pool {
 public:
  // False where others have the workers at present.
  bool run(const Work& work, int threads) {
    const std::unique_lock<std::mutex> own(use_, std::try_to_lock);
    if (!own) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < threads - 1) {
        std::thread([this, index = workers_] { serve(index); }).detach();
        ++workers_;
      }
      work_ = work;
      helpers_ = threads - 1;
      next_.store(0, std::memory_order_relaxed);
      failed_ = nullptr;
      open_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    take_parts(work);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      open_ = false;
    }
    for (int i = 0; running_.load(std::memory_order_acquire) > 0; ++i)
      i < kSpins ? pause() : std::this_thread::yield();
    if (failed_) std::rethrow_exception(failed_);
    return true;
  }

 private:
  void take_parts(const Work& work) {
    try {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < work.parts;)
        work.body(work.n * i / work.parts, work.n * (i + 1) / work.parts, work.context);
    } catch (...) {
      next_.store(work.parts, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(mutex_);
      failed_ = std::current_exception();
    }
  }

  void serve(int index) {
    is_worker = true;
    uint64_t seen = 0;
    for (;;) {
      for (int i = 0; i < kSpins && generation_.load(std::memory_order_acquire) == seen; ++i)
        pause();
      Work work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        seen = generation_.load(std::memory_order_relaxed);
        if (!open_ || index >= helpers_) continue;
        running_.fetch_add(1, std::memory_order_relaxed);
        work = work_;
      }
      take_parts(work);
      running_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex use_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int64_t> next_{0};
  std::atomic<int> running_{0};
  Work work_;
  int workers_ = 0, helpers_ = 0;
  bool open_ = false;
  std::exception_ptr failed_;
};

// Never destroyed: workers may sleep in it when the program ends.
Pool& pool() {
  static Pool* const pool = new Pool;
  return *pool;
}

}  // namespace

int parallel_threads() { return is_worker ? 1 : wanted.load(std::memory_order_relaxed); }

void parallel_run(int64_t n, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  const int threads = parallel_threads();
  const int64_t most = n / (grain > 1 ? grain : 1);
  const int64_t parts = most < 4 * threads ? most : 4 * threads;
  if (threads < 2 || parts < 2 || !pool().run({n, parts, body, context}, threads))
    body(0, n, context);
}

const char* network::set_threads(int count) {
  if (count > 1024) return "count must be at most 1024";
  wanted.store(count, std::memory_order_relaxed);
  return nullptr;
}

}  // namespace bitkernels
