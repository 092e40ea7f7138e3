#include "simt/executor.h"

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cstring>
#include <exception>
#include <map>
#include <numeric>
#include <random>
#include <utility>

#include "simt/block.h"

namespace mor::simt {

constinit thread_local Position position;
constinit thread_local Block* current = nullptr;

namespace {

constexpr Dim kMaxGrid{0x7fffffff, 65535, 65535};
constexpr int64_t kMaxShared = 163 << 10;  // bytes, of sm_80
constexpr int64_t kSharedAlign = 128;
constexpr int kMaxIdle = 10000;  // rounds of nothing but threads that wait in a loop

struct Failed {};

// ---- messages ----

std::string text_of(Dim d) {
  return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
}

std::string text_of(Site site) {
  const char* file = std::strrchr(site.file_name(), '/');
  return std::string(file ? file + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string with_place(const std::string& message, int thread) {
  return message + "; kernel " + current->launch.kernel + ", block " + text_of(position.block) +
         ", thread " + std::to_string(thread);
}

std::string doing(const Warp& warp, int lane) {
  if (warp.returned >> lane & 1) {
    return "returned";
  }
  if (warp.yielded >> lane & 1) {
    return "wait in a loop";
  }
  return std::string("wait at ") + warp.waits[lane].name + ", " + text_of(warp.waits[lane].site);
}

// What the threads are doing, when none can go on.
std::string standstill() {
  std::map<std::string, std::vector<int>> groups;
  int alive = block_size();
  for (int t = block_size() - 1; t >= 0; --t) {
    const Warp& warp = current->warps[static_cast<size_t>(t / kWarp)];
    groups[doing(warp, t % kWarp)].push_back(t);
    alive = warp.returned >> t % kWarp & 1 ? alive : t;
  }
  std::string text = "no thread can go on:";
  for (const auto& [what, threads] : groups) {
    text += (text.back() == ':' ? " " : ", ") + std::to_string(threads.size()) + " " + what +
            " (thread " + std::to_string(threads.back()) + (threads.size() > 1 ? ", ...)" : ")");
  }
  return with_place(text, alive);
}

bool same(Site a, Site b) {
  return std::memcmp(&a, &b, sizeof(Site)) == 0 ||
         (a.line() == b.line() && a.column() == b.column());
}

// ---- threads ----

// Takes a thread that can run, of the same warp if there is one; -1: there is none.
int take_ready() {
  const int warps = static_cast<int>(current->warps.size());
  const int own = std::max(position.thread, 0) / kWarp;
  for (int i = own; i < own + warps; ++i) {
    const int w = i < warps ? i : i - warps;
    if (uint32_t& ready = current->warps[static_cast<size_t>(w)].ready; ready != 0) {
      const int lane = std::countr_zero(ready);
      ready &= ready - 1;
      return w * kWarp + lane;
    }
  }
  return -1;
}

// Runs others until this thread is ready and its turn comes.
void leave() {
  Fiber& own = thread_of(position.thread).fiber;
  position.thread = take_ready();
  own.switch_to(position.thread < 0 ? current->scheduler : thread_of(position.thread).fiber);
}

void thread_main() {
  try {
    current->body(current->context);
  } catch (const Failed&) {
  } catch (const std::exception& exception) {
    current->error = with_place(std::string("exception: ") + exception.what(), position.thread);
  }
  if (!current->error.empty()) {
    Fiber& own = thread_of(position.thread).fiber;
    position.thread = -1;
    own.switch_to(current->scheduler);
  }
  arrive_copies(INT64_MAX);  // too late for others to see
  running_warp().returned |= running_lane();
  --current->alive;
  current->idle = 0;
  leave();
}

// All lanes of the warp go on.
void let_go(Warp& warp) {
  warp.ready = warp.lanes;
  current->idle = 0;
}

// Lanes of the running thread's warp that come to a primitive together: true in the last of them,
// which finds the operands of all.
bool join(uint32_t mask, const char* name, Site site, void* operand, void* (&operands)[kWarp]) {
  Warp& warp = running_warp();
  const uint32_t own = running_lane();
  warp.waits[position.thread % kWarp] = {name, site, mask, operand};
  if ((mask & own) == 0) {
    fail(std::string(name) + " by a lane that its mask leaves out", site);
  }
  if (const uint32_t missing = mask & ~(warp.lanes & ~warp.returned); missing != 0) {
    const int lane = std::countr_zero(missing);
    fail(std::string(name) + " waits for lane " + std::to_string(lane) +
             (warp.lanes >> lane & 1 ? ", which has returned" : ", which the block does not have"),
         site);
  }
  warp.joining |= own;
  if ((mask & ~warp.joining) != 0) {
    return false;
  }
  for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
    const int lane = std::countr_zero(rest);
    const Wait& other = warp.waits[lane];
    if (other.mask != mask || !same(other.site, site)) {
      fail("not all lanes reach this " + std::string(name) + ": thread " +
               std::to_string(thread_of_lane(lane)) + " waits at " + other.name + ", " +
               text_of(other.site),
           site);
    }
    operands[lane] = other.operand;
  }
  warp.joining &= ~mask;
  return true;
}

// ---- blocks ----

void start_block() {
  Block& block = *current;
  for (size_t w = 0; w < block.warps.size(); ++w) {
    const int lanes = std::min(block_size() - static_cast<int>(w) * kWarp, kWarp);
    block.warps[w] = Warp{};
    block.warps[w].lanes = block.warps[w].ready = 0xffffffffu >> (kWarp - lanes);
  }
  for (int t = 0; t < block_size(); ++t) {
    Thread& thread = thread_of(t);
    thread.copies.clear();  // of a block that has failed
    thread.arrived = 0;
    thread.group = 0;
    thread.fiber.start(&thread_main, t);
  }
  block.alive = block_size();
  block.idle = 0;
  block.arrived = 0;
  std::ranges::fill(block.named, NamedBarrier{});
  std::memset(block.shared, 0xff, static_cast<size_t>(block.launch.shared_bytes));
  block.races.start_block(block_size(), block.launch.shared_bytes);
}

// False: no thread waits in a loop.
bool resume_yielded() {
  bool any = false;
  for (Warp& warp : current->warps) {
    any = any || warp.yielded != 0;
    warp.ready |= std::exchange(warp.yielded, 0);
  }
  return any;
}

void run_block() {
  Block& block = *current;
  start_block();
  while (block.alive > 0 && block.error.empty()) {
    position.thread = take_ready();
    if (position.thread >= 0) {
      block.scheduler.switch_to(thread_of(position.thread).fiber);  // back when none is ready
    } else if (block.idle++ == kMaxIdle || !resume_yielded()) {
      block.error = standstill();
    }
  }
  position.thread = -1;
}

// ---- launches ----

std::string invalid(const Launch& launch) {
  const auto [kernel, grid, block, shared_bytes] = launch;
  const std::string launched = std::string("kernel ") + kernel + ": launched ";
  if (position.thread >= 0) {
    return launched + "by a kernel";
  }
  if (block < 1 || block > kMaxBlock) {
    return launched + "with " + std::to_string(block) + " threads a block, CUDA has up to " +
           std::to_string(kMaxBlock);
  }
  if (grid.x > kMaxGrid.x || grid.y > kMaxGrid.y || grid.z > kMaxGrid.z) {
    return launched + "with a grid of " + text_of(grid) + ", CUDA has up to " + text_of(kMaxGrid);
  }
  if (shared_bytes < 0 || shared_bytes > kMaxShared) {
    return launched + "with " + std::to_string(shared_bytes) +
           " bytes of shared memory a block, sm_80 has " + std::to_string(kMaxShared);
  }
  return "";
}

void prepare(const Launch& launch) {
  Block& block = *current;
  block.launch = launch;
  block.error.clear();
  block.arrays.clear();
  block.warps.resize(static_cast<size_t>((launch.block + kWarp - 1) / kWarp));
  block.memory.resize(static_cast<size_t>(launch.shared_bytes + kSharedAlign));
  const auto address = reinterpret_cast<uintptr_t>(block.memory.data());
  block.shared = block.memory.data() + (kSharedAlign - address % kSharedAlign) % kSharedAlign;
}

// The caller may have asked for denormals to be flushed or for another rounding; a GPU does not
// know.
struct DefaultFloats {
  DefaultFloats() {
    std::fegetenv(&callers);
    std::fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloats() { std::fesetenv(&callers); }
  std::fenv_t callers;
};

}  // namespace

std::string run(const Launch& launch, void (*body)(void*), void* context) {
  if (std::string error = invalid(launch); !error.empty()) {
    return error;
  }
  // On the heap: there is little room for thread_local variables that are an address away.
  static thread_local const auto block_of_this_thread = std::make_unique<Block>();
  static thread_local std::minstd_rand random;
  const DefaultFloats floats;
  Block& block = *block_of_this_thread;
  current = &block;
  prepare(launch);
  block.body = body;
  block.context = context;

  const Dim grid = launch.grid;
  std::vector<int64_t> order(static_cast<size_t>(int64_t{grid.x} * grid.y * grid.z));
  std::iota(order.begin(), order.end(), 0);
  std::ranges::shuffle(order, random);
  position = {-1, launch.block, {}, grid};
  for (const int64_t i : order) {
    position.block = {static_cast<uint32_t>(i % grid.x), static_cast<uint32_t>(i / grid.x % grid.y),
                      static_cast<uint32_t>(i / grid.x / grid.y)};
    run_block();
    if (!block.error.empty()) {
      block.races.forget();
      break;
    }
  }
  return block.error;
}

// ---- within a kernel ----

void fail(const std::string& message, Site site, int thread) {
  current->error = with_place(message, thread) + ", " + text_of(site);
  throw Failed();
}

void yield() {
  running_warp().yielded |= running_lane();
  leave();
}

void sync_threads(Site site) {
  Block& block = *current;
  running_warp().waits[position.thread % kWarp] = {"sync_threads", site};
  if (block.arrived++ == 0) {
    block.barrier_site = site;
  } else if (!same(site, block.barrier_site)) {
    fail("other threads wait at another barrier: sync_threads, " + text_of(block.barrier_site),
         site);
  }
  if (block.arrived < block_size()) {
    return leave();
  }
  block.arrived = 0;
  block.races.block_barrier();
  for (Warp& warp : block.warps) {
    let_go(warp);
  }
  running_warp().ready &= ~running_lane();
}

void sync_named(int id, int threads, bool wait, Site site) {
  struct Operand {
    int id, threads;
  } own{id, threads};
  Warp& warp = running_warp();
  void* operands[kWarp];
  if (!join(warp.lanes, wait ? "sync_named" : "arrive_named", site, &own, operands)) {
    return leave();
  }
  for (uint32_t rest = warp.lanes; rest != 0; rest &= rest - 1) {
    const auto* other = static_cast<const Operand*>(operands[std::countr_zero(rest)]);
    if (other->id != id || other->threads != threads) {
      fail("the lanes of a warp come to different named barriers", site);
    }
  }
  const int warps = static_cast<int>(current->warps.size());
  if (id < 1 || id >= kNamedBarriers) {
    fail("named barrier " + std::to_string(id) + ", must be in [1, 16)", site);
  }
  if (threads < kWarp || threads % kWarp != 0 || threads > warps * kWarp) {
    fail("named barrier for " + std::to_string(threads) +
             " threads, must be whole warps of the block's " + std::to_string(block_size()),
         site);
  }
  NamedBarrier& barrier = current->named[id];
  const int w = position.thread / kWarp;
  if (barrier.arrived != 0 && barrier.threads != threads) {
    fail("named barrier " + std::to_string(id) + " for " + std::to_string(threads) +
             " threads, others have come to it for " + std::to_string(barrier.threads),
         site);
  }
  if (barrier.arrived >> w & 1) {
    fail("warp " + std::to_string(w) + " comes to named barrier " + std::to_string(id) +
             " a second time, before the others have come",
         site);
  }
  barrier.threads = threads;
  barrier.arrived |= 1u << w;
  barrier.waiting |= wait ? 1u << w : 0;
  current->races.arrive(w, barrier.clock);
  const bool complete = std::popcount(barrier.arrived) * kWarp == threads;
  if (complete) {
    for (uint32_t rest = barrier.waiting; rest != 0; rest &= rest - 1) {
      current->races.pass(std::countr_zero(rest), barrier.clock);
      let_go(current->warps[static_cast<size_t>(std::countr_zero(rest))]);
    }
    barrier = NamedBarrier{};
  } else if (wait) {
    return leave();
  }
  warp.ready = warp.lanes & ~running_lane();
}

// Where a launch spends most of its time: flat.
[[gnu::flatten]] void collective(uint32_t mask, const char* name, Site site, void* operand,
                                 Complete complete) {
  void* operands[kWarp];
  if (!join(mask, name, site, operand, operands)) {
    return leave();
  }
  complete(operands, mask);
  running_warp().ready |= mask & ~running_lane();
}

}  // namespace mor::simt
