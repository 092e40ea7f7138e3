// Switching stacks: a few instructions on x86-64 and AArch64, ucontext elsewhere.
#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>

#if !defined(__x86_64__) && !defined(__aarch64__)
#define MOR_SIMT_UCONTEXT 1  // may also be asked for
#endif

#if defined(MOR_SIMT_UCONTEXT)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// void mor_simt_switch(void** save, void* load): pushes the registers that a call preserves, keeps
// the stack in *save, and pops them from the stack load.
#if !defined(MOR_SIMT_UCONTEXT)
extern "C" void mor_simt_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl mor_simt_switch
.hidden mor_simt_switch
.type mor_simt_switch, @function
mor_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mor_simt_switch, .-mor_simt_switch
)");
constexpr int kSavedWords = 8, kReturnAddress = 6;  // the last word: where run() would return to
#else
asm(R"(
.text
.globl mor_simt_switch
.hidden mor_simt_switch
.type mor_simt_switch, %function
mor_simt_switch:
  sub sp, sp, #160
  stp x29, x30, [sp, #0]
  stp x19, x20, [sp, #16]
  stp x21, x22, [sp, #32]
  stp x23, x24, [sp, #48]
  stp x25, x26, [sp, #64]
  stp x27, x28, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x29, x30, [sp, #0]
  ldp x19, x20, [sp, #16]
  ldp x21, x22, [sp, #32]
  ldp x23, x24, [sp, #48]
  ldp x25, x26, [sp, #64]
  ldp x27, x28, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size mor_simt_switch, .-mor_simt_switch
)");
constexpr int kSavedWords = 20, kReturnAddress = 1;
#endif
#endif

namespace mor::simt {

struct Fiber::Context {
  char *stack = nullptr, *top = nullptr;  // null: not its own
  void (*entry)() = nullptr;
#if defined(MOR_SIMT_UCONTEXT)
  ucontext_t registers;
#else
  void* registers = nullptr;  // on the stack
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;  // of a stack that is not its own: as the sanitizer told
  size_t bytes = 0;
#endif

  void unpoison();
  static void arrive();
  [[noreturn]] static void run();

  static constinit thread_local Context *from, *to;  // of the latest switch
};

constinit thread_local Fiber::Context* Fiber::Context::from = nullptr;
constinit thread_local Fiber::Context* Fiber::Context::to = nullptr;

namespace {

constexpr size_t kStackBytes = 1 << 18;  // pages that nobody uses cost nothing

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Fiber::Fiber() : context_(new Context) {}

Fiber::Fiber(int number) : context_(new Context) {
  // The lowest page stays out of bounds.
  void* memory = mmap(nullptr, page_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page_bytes(), PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  context_->stack = static_cast<char*>(memory) + page_bytes();
  // Tops that are all at the same place of a page would share a few sets of the cache.
  context_->top = context_->stack + kStackBytes - number * 576 % 4096;
}

Fiber::~Fiber() {
  if (context_->stack != nullptr) {
    context_->unpoison();
    munmap(context_->stack - page_bytes(), page_bytes() + kStackBytes);
  }
}

// What calls that were left in the middle have marked on the stack.
void Fiber::Context::unpoison() {
#if defined(__SANITIZE_ADDRESS__)
#if defined(MOR_SIMT_UCONTEXT)
  const char* used = stack;
#else
  const char* used = registers == nullptr ? top : static_cast<const char*>(registers);
#endif
  __asan_unpoison_memory_region(used, static_cast<size_t>(stack + kStackBytes - used));
#endif
}

// The first thing on the new stack.
void Fiber::Context::arrive() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(to->fake_stack, &from->bottom, &from->bytes);
#endif
}

void Fiber::Context::run() {
  arrive();
  to->entry();
  std::abort();  // entry must not return
}

void Fiber::start(void (*entry)()) {
  context_->unpoison();
  context_->entry = entry;
#if defined(__SANITIZE_ADDRESS__)
  context_->fake_stack = nullptr;
#endif
#if defined(MOR_SIMT_UCONTEXT)
  getcontext(&context_->registers);
  context_->registers.uc_stack.ss_sp = context_->stack;
  context_->registers.uc_stack.ss_size = static_cast<size_t>(context_->top - context_->stack);
  context_->registers.uc_link = nullptr;
  makecontext(&context_->registers, &Context::run, 0);
#else
  auto* saved = reinterpret_cast<uintptr_t*>(context_->top) - kSavedWords;
  std::fill_n(saved, kSavedWords, 0);
  saved[kReturnAddress] = reinterpret_cast<uintptr_t>(&Context::run);
  context_->registers = saved;
#endif
}

void Fiber::switch_to(Fiber& other) {
  Context::from = context_.get();
  Context::to = other.context_.get();
#if defined(__SANITIZE_ADDRESS__)
  const bool own = Context::to->stack != nullptr;
  __sanitizer_start_switch_fiber(&context_->fake_stack,
                                 own ? Context::to->stack : Context::to->bottom,
                                 own ? kStackBytes : Context::to->bytes);
#endif
#if defined(MOR_SIMT_UCONTEXT)
  swapcontext(&context_->registers, &other.context_->registers);
#else
  mor_simt_switch(&context_->registers, other.context_->registers);
#endif
  Context::arrive();
}

}  // namespace mor::simt
