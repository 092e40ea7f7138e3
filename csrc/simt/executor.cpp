#include "simt/executor.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <random>

#include "simt/block.h"

namespace mor::simt {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxBlock = 1024;
constexpr int kMaxIdlePasses = 100000;  // of nothing but yields

thread_local std::unique_ptr<Block> block_of_this_thread;

std::string place(std::source_location site) {
  const char* file = std::strrchr(site.file_name(), '/');
  return std::string(file ? file + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string where(const Block& block) {
  const Dim b = block.index;
  return std::string("kernel ") + block.launch.kernel + ", block (" + std::to_string(b.x) + ", " +
         std::to_string(b.y) + ", " + std::to_string(b.z) + "), thread " +
         std::to_string(block.running);
}

// Leaves the running thread until it waits no longer.
void wait_for_others() {
  Thread& thread = current_thread();
  thread.fiber.leave();
}

void let_go(Thread& thread) {
  thread.wait = Wait{};
  current_block().progress = true;
}

void thread_main(void*) {
  Block& block = current_block();
  block.body(block.context);
  Thread& thread = current_thread();
  thread.done = true;
  block.progress = true;
  thread.fiber.leave();
}

// What every thread is doing, when nothing can go on.
std::string standstill(const Block& block) {
  std::map<std::string, std::vector<int>> groups;
  for (int t = 0; t < block.launch.block; ++t) {
    const Thread& thread = block.threads[static_cast<size_t>(t)];
    const std::string doing =
        thread.done ? "have returned"
        : thread.wait.name == nullptr
            ? "wait in a loop"
            : std::string("wait at ") + thread.wait.name + " (" + place(thread.wait.site) + ")";
    groups[doing].push_back(t);
  }
  std::string text = "not all threads reach the same barrier:";
  for (const auto& [doing, threads] : groups) {
    text += " " + std::to_string(threads.size()) + " threads " + doing + ", the first is thread " +
            std::to_string(threads.front()) + ";";
  }
  text.pop_back();
  return text;
}

void run_block(Block& block) {
  const auto threads = static_cast<size_t>(block.launch.block);
  while (block.threads.size() < threads) {
    block.threads.emplace_back();
  }
  for (size_t t = 0; t < threads; ++t) {
    Thread& thread = block.threads[t];
    thread.done = false;
    thread.wait = Wait{};
    thread.copies.clear();
    thread.group = 0;
    thread.fiber.start(&thread_main, nullptr);
  }
  block.arrived = 0;
  for (NamedBarrier& barrier : block.named) {
    barrier = NamedBarrier{};
  }
  std::memset(block.shared, 0xff, static_cast<size_t>(block.launch.shared_bytes));
  block.races.reset(block.launch.block, block.launch.shared_bytes);

  int idle = 0;
  for (bool alive = true; alive;) {
    alive = false;
    block.progress = false;
    bool ran = false;
    for (size_t t = 0; t < threads; ++t) {
      Thread& thread = block.threads[t];
      if (!thread.done && thread.wait.name == nullptr) {
        block.running = static_cast<int>(t);
        thread.fiber.resume();
        if (!block.error.empty()) {
          return;
        }
        ran = true;
      }
      alive = alive || !thread.done;
    }
    idle = block.progress ? 0 : idle + 1;
    if (alive && (!ran || idle > kMaxIdlePasses)) {
      for (block.running = 0; block.threads[static_cast<size_t>(block.running)].done;) {
        ++block.running;
      }
      block.error = standstill(block) + "; " + where(block);
      return;
    }
  }
}

void require_shared(Block& block) {
  constexpr int64_t kAlign = 128;
  if (block.launch.shared_bytes > block.shared_capacity || block.shared == nullptr) {
    block.shared_capacity = block.launch.shared_bytes;
    block.memory.reset(new char[static_cast<size_t>(block.shared_capacity + kAlign)]);
    const auto address = reinterpret_cast<uintptr_t>(block.memory.get());
    block.shared = block.memory.get() + (kAlign - address % kAlign) % kAlign;
  }
}

}  // namespace

Block& current_block() {
  return *block_of_this_thread;
}

std::string run(const Launch& launch, void (*body)(void*), void* context) {
  const Dim grid = launch.grid;
  if (launch.block < 1 || launch.block > kMaxBlock) {
    return std::string("kernel ") + launch.kernel + ": " + std::to_string(launch.block) +
           " threads in a block";
  }
  if (!block_of_this_thread) {
    block_of_this_thread = std::make_unique<Block>();
  }
  Block& block = current_block();
  block.launch = launch;
  block.body = body;
  block.context = context;
  block.error.clear();
  require_shared(block);

  std::vector<int64_t> order(static_cast<size_t>(int64_t{grid.x} * grid.y * grid.z));
  for (size_t i = 0; i < order.size(); ++i) {
    order[i] = static_cast<int64_t>(i);
  }
  static thread_local std::minstd_rand random(1);
  std::shuffle(order.begin(), order.end(), random);
  for (const int64_t i : order) {
    block.index = {static_cast<uint32_t>(i % grid.x), static_cast<uint32_t>(i / grid.x % grid.y),
                   static_cast<uint32_t>(i / grid.x / grid.y)};
    run_block(block);
    if (!block.error.empty()) {
      break;
    }
  }
  block.running = -1;
  return block.error;
}

int thread_index() {
  return current_block().running;
}

int block_size() {
  return current_block().launch.block;
}

Dim block_index() {
  return current_block().index;
}

Dim grid_size() {
  return current_block().launch.grid;
}

void fail(const std::string& message) {
  Block& block = current_block();
  block.error = message + "; " + where(block);
  current_thread().fiber.leave();
  std::abort();  // a failed block is not resumed
}

void yield() {
  current_thread().fiber.leave();
}

void sync_threads(std::source_location site) {
  Block& block = current_block();
  current_thread().wait = {"sync_threads", site, 0, nullptr};
  if (++block.arrived < block.launch.block) {
    return wait_for_others();
  }
  for (int t = 0; t < block.launch.block; ++t) {
    Thread& thread = block.threads[static_cast<size_t>(t)];
    if (thread.wait.site.line() != site.line() || thread.wait.site.column() != site.column()) {
      fail("threads wait at different barriers: sync_threads at " + place(site) + " and " +
           place(thread.wait.site));
    }
    let_go(thread);
  }
  block.arrived = 0;
  block.races.block_barrier();
}

void sync_named(int id, int threads, bool wait, std::source_location site) {
  Block& block = current_block();
  if (id < 1 || id >= kNamedBarriers || threads % kWarp != 0 || threads > block.launch.block) {
    fail("named barrier " + std::to_string(id) + " for " + std::to_string(threads) + " threads (" +
         place(site) + ")");
  }
  NamedBarrier& barrier = block.named[id];
  if (!barrier.arrived.empty() && barrier.threads != threads) {
    fail("named barrier " + std::to_string(id) + " is for " + std::to_string(barrier.threads) +
         " threads and for " + std::to_string(threads) + " (" + place(site) + ")");
  }
  barrier.threads = threads;
  barrier.arrived.push_back(block.running);
  if (wait) {
    current_thread().wait = {"sync_named", site, static_cast<uint32_t>(id), nullptr};
  }
  if (static_cast<int>(barrier.arrived.size()) < threads) {
    return wait ? wait_for_others() : void();
  }
  std::vector<int> waiting;
  for (const int t : barrier.arrived) {
    Thread& thread = block.threads[static_cast<size_t>(t)];
    const bool here = thread.wait.name != nullptr && thread.wait.operand == nullptr &&
                      std::strcmp(thread.wait.name, "sync_named") == 0 &&
                      thread.wait.mask == static_cast<uint32_t>(id);
    if (here) {
      waiting.push_back(t);
      let_go(thread);
    }
  }
  block.races.barrier(barrier.arrived, waiting);
  barrier = NamedBarrier{};
}

int thread_of_lane(int lane) {
  return current_block().running / kWarp * kWarp + lane;
}

void collective(uint32_t mask, const char* name, std::source_location site, void* operand,
                Complete complete) {
  Block& block = current_block();
  const int own_lane = block.running % kWarp;
  if ((mask >> own_lane & 1) == 0) {
    fail(std::string(name) + " by lane " + std::to_string(own_lane) +
         ", which its mask leaves out (" + place(site) + ")");
  }
  current_thread().wait = {name, site, mask, operand};
  void* operands[kWarp] = {};
  bool all = true;
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest), t = thread_of_lane(lane);
    if (t >= block.launch.block || block.threads[static_cast<size_t>(t)].done) {
      fail(std::string(name) + " (" + place(site) + ") waits for lane " + std::to_string(lane) +
           ", which has returned");
    }
    const Wait& other = block.threads[static_cast<size_t>(t)].wait;
    if (other.name == nullptr) {
      all = false;
      break;  // the last to arrive looks at all
    }
    if (other.mask != mask || other.site.line() != site.line() ||
        other.site.column() != site.column()) {
      fail("not all lanes reach " + std::string(name) + " (" + place(site) + "): lane " +
           std::to_string(lane) + " waits at " + other.name + " (" + place(other.site) + ")");
    }
    operands[lane] = other.operand;
  }
  if (!all) {
    return wait_for_others();
  }
  complete(operands, mask);
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    let_go(block.threads[static_cast<size_t>(thread_of_lane(std::countr_zero(rest)))]);
  }
}

}  // namespace mor::simt
