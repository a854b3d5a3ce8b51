// The part of CUDA's language that csrc's kernels for GPUs use, on one processor: every thread of a block is a fiber. Included before each
// source; build.py has rewritten launches to `emulation::launch` and shared arrays to static ones.
//
// The blocks of a cluster are threads of the processor, so that each has its own shared arrays: what is static there is a thread's.
//
// The order in which warps, lanes and blocks run is drawn anew at every turn, so that code which misses a barrier or relies on
// the order of blocks computes something else from run to run. What real GPUs would leave undefined aborts: a shuffle in which
// a lane of the warp takes no part, and a barrier that other threads are past.
#pragma once

#include <cuda_runtime.h>
#include <ucontext.h>

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulation {

inline thread_local uint3 thread_index{}, block_index{};
inline thread_local dim3 grid_size{};

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "emulated GPU: %s\n", what);
  std::abort();
}

enum class State { ready, shuffle, barrier, cluster, done };

constexpr int kMostBlocks = 8;  // of a cluster

// Something of a thread's static memory: another thread has all of it at the same distances from its own.
inline thread_local char anchor;

// The blocks of a cluster.
class Cluster {
 public:
  explicit Cluster(int blocks) : blocks_(blocks) {}

  // Waits for the other blocks. `last`: there is nothing more that this one does.
  void wait(bool last) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (waiting_ == 0) last_ = last;
    if (last_ != last) fail("a barrier that some blocks of the cluster never reach");
    const int phase = phase_;
    if (++waiting_ == blocks_) {
      waiting_ = 0;
      ++phase_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return phase_ != phase; });
    }
  }

  char* anchors[kMostBlocks] = {};

 private:
  int blocks_;
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0, phase_ = 0;
  bool last_ = false;
};

inline thread_local Cluster* cluster = nullptr;
inline thread_local std::vector<char> shared_memory;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state;
  uint64_t value;  // what the lane offers in a shuffle, then what it gets
  int partner;     // whose value it wants: a lane of its warp
};

// One block at a time, on the thread that launches.
class Block {
 public:
  void run(int threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.emplace_back(new Fiber);
    threads_ = threads;
    for (int t = 0; t < threads; ++t) start(t);
    const int warps = (threads + kWarp - 1) / kWarp;
    while (true) {
      const int turn = draw(warps);
      for (int w = 0; w < warps; ++w) run_warp((w + turn) % warps);
      int done = 0, waiting = 0, clustered = 0;
      for (int t = 0; t < threads; ++t) {
        done += fibers_[t]->state == State::done;
        waiting += fibers_[t]->state == State::barrier;
        clustered += fibers_[t]->state == State::cluster;
      }
      if (done == threads) return;
      if (done > 0) fail("a barrier that some threads of the block never reach");
      if (clustered == threads) {
        cluster->wait(false);
        waiting = threads;
      }
      if (waiting != threads) fail("threads wait for each other for ever");
      for (int t = 0; t < threads; ++t) fibers_[t]->state = State::ready;
    }
  }

  void wait() { yield(State::barrier); }

  void wait_for_cluster() {
    if (cluster == nullptr) fail("a barrier of a cluster in a launch without clusters");
    yield(State::cluster);
  }

  void seed(uint64_t number) { random_ = number; }

  template <typename T>
  T shuffle_xor(unsigned mask, T value, int lanes) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "a shuffle moves eight bytes at most");
    if (mask != 0xFFFFFFFFu) fail("only whole warps are emulated");
    Fiber& fiber = *fibers_[current_];
    std::memcpy(&fiber.value, &value, sizeof(T));
    fiber.partner = (current_ % kWarp) ^ lanes;
    yield(State::shuffle);
    std::memcpy(&value, &fiber.value, sizeof(T));
    return value;
  }

  int draw(int below) {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<int>((random_ >> 33) % static_cast<uint64_t>(below));
  }

 private:
  void start(int t) {
    Fiber& fiber = *fibers_[t];
    fiber.state = State::ready;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::enter, 0);
  }

  static void enter();

  // Until every lane is through or waits at a barrier.
  void run_warp(int warp) {
    const int first = warp * kWarp, lanes = threads_ - first < kWarp ? threads_ - first : kWarp;
    while (true) {
      const int turn = draw(lanes), sign = draw(2) == 0 ? 1 : lanes - 1;
      for (int i = 0; i < lanes; ++i) {
        const int t = first + (turn + sign * i) % lanes;
        if (fibers_[t]->state == State::ready) resume(t);
      }
      int shuffling = 0;
      for (int i = 0; i < lanes; ++i) shuffling += fibers_[first + i]->state == State::shuffle;
      if (shuffling == 0) return;
      if (shuffling != kWarp) fail("a shuffle in which a lane of the warp takes no part");
      uint64_t values[kWarp];
      for (int i = 0; i < kWarp; ++i) values[i] = fibers_[first + fibers_[first + i]->partner]->value;
      for (int i = 0; i < kWarp; ++i) {
        fibers_[first + i]->value = values[i];
        fibers_[first + i]->state = State::ready;
      }
    }
  }

  void resume(int t) {
    current_ = t;
    thread_index = uint3{static_cast<unsigned>(t), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, fibers_[t]->stack.get(), kStack);
#endif
    swapcontext(&scheduler_, &fibers_[t]->context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_, nullptr, nullptr);
#endif
  }

  void yield(State state) {
    Fiber& fiber = *fibers_[current_];
    fiber.state = state;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(state == State::done ? nullptr : &fake, bottom_, size_);
#endif
    swapcontext(&fiber.context, &scheduler_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &bottom_, &size_);
#endif
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  const std::function<void()>* kernel_ = nullptr;
  ucontext_t scheduler_;
  int threads_ = 0;
  int current_ = 0;
  uint64_t random_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#endif
};

inline thread_local Block block;

inline void Block::enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.bottom_, &block.size_);
#endif
  (*block.kernel_)();
  block.yield(State::done);
}

// What was launched: csrc's tests ask whether it is everything.
inline std::set<std::string> launched;

inline void launch(const char* name, dim3 grid, int threads, const std::function<void()>& kernel) {
  launched.insert(name);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535)
    fail("a grid that no GPU takes");
  if (threads < 1 || threads > 1024) fail("a block that no GPU takes");
  grid_size = grid;
  const uint64_t blocks = static_cast<uint64_t>(grid.x) * grid.y * grid.z;
  const auto turn = static_cast<uint64_t>(block.draw(static_cast<int>(blocks < INT32_MAX ? blocks : INT32_MAX)));
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t number = (i + turn) % blocks;
    block_index = uint3{
        static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
        static_cast<unsigned>(number / grid.x / grid.y)};
    block.run(threads, kernel);
  }
}

// Launches clusters of `blocks` blocks, of which each has `shared` bytes beside its static arrays.
inline void launch_clusters(
    const char* name, unsigned grid, int threads, int blocks, int64_t shared, const std::function<void()>& kernel) {
  launched.insert(name);
  if (grid == 0 || grid > 0x7FFFFFFFu || blocks < 1 || blocks > kMostBlocks || grid % static_cast<unsigned>(blocks) != 0)
    fail("a grid of clusters that no GPU takes");
  if (threads < 1 || threads > 1024 || shared < 0 || shared > 227 << 10) fail("a block that no GPU takes");
  Cluster together(blocks);
  const unsigned clusters = grid / static_cast<unsigned>(blocks), turn = static_cast<unsigned>(block.draw(1 << 30)) % clusters;
  const auto work = [&](int rank, uint64_t seed) {
    cluster = &together;
    together.anchors[rank] = &anchor;
    together.wait(true);
    block.seed(seed);
    grid_size = dim3(grid);
    for (unsigned i = 0; i < clusters; ++i) {
      block_index = uint3{(i + turn) % clusters * static_cast<unsigned>(blocks) + static_cast<unsigned>(rank), 0, 0};
      // NaN in every dtype: what no thread has written is no number.
      shared_memory.assign(static_cast<size_t>(shared), static_cast<char>(0xFF));
      block.run(threads, kernel);
      together.wait(true);
    }
  };
  std::vector<std::thread> others;
  for (int rank = 0; rank < blocks; ++rank) others.emplace_back(work, rank, static_cast<uint64_t>(block.draw(1 << 30)));
  for (std::thread& other : others) other.join();
}

inline void* dynamic_shared() { return shared_memory.data(); }

}  // namespace emulation

inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_wait() { emulation::block.wait_for_cluster(); }

// Of a static array.
inline void* __cluster_map_shared_rank(const void* pointer, unsigned rank) {
  return emulation::cluster->anchors[rank] + (static_cast<const char*>(pointer) - &emulation::anchor);
}

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define gridDim ::emulation::grid_size

inline void __syncthreads() { emulation::block.wait(); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return emulation::block.shuffle_xor(mask, value, lanes);
}

inline uint64_t __umul64hi(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline float __fdividef(float a, float b) { return b > 0x1p126f ? 0.0f : a / b; }

inline float __fmul_rn(float a, float b) { return a * b; }

inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof(x));
  return bits;
}

inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
