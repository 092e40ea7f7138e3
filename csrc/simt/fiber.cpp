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

#if defined(MOR_SANITIZE)
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
namespace {

constexpr size_t kStackBytes = 1 << 18;  // pages that nobody uses cost nothing

constinit thread_local Fiber *from = nullptr, *to = nullptr;  // of the latest switch

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

// Above a page that is out of bounds.
char* new_stack() {
  void* memory = mmap(nullptr, page_bytes() + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page_bytes(), PROT_NONE) != 0) {
    throw std::bad_alloc();
  }
  return static_cast<char*>(memory) + page_bytes();
}

}  // namespace

Fiber::~Fiber() {
  if (stack_ != nullptr) {
    unpoison();
    munmap(stack_ - page_bytes(), page_bytes() + kStackBytes);
  }
#if defined(MOR_SIMT_UCONTEXT)
  delete static_cast<ucontext_t*>(registers_);
#endif
}

void Fiber::start(void (*entry)(), int number) {
  if (stack_ == nullptr) {
    stack_ = new_stack();
    bottom_ = stack_;
    bytes_ = kStackBytes;
  }
  unpoison();
  entry_ = entry;
  fake_stack_ = nullptr;
  // Tops that are all at the same place of a page would share a few sets of the cache.
  const size_t bytes = kStackBytes - static_cast<size_t>(number) * 576 % 4096;
#if defined(MOR_SIMT_UCONTEXT)
  registers_ = registers_ == nullptr ? new ucontext_t : registers_;
  auto* context = static_cast<ucontext_t*>(registers_);
  getcontext(context);
  context->uc_stack.ss_sp = stack_;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, &Fiber::run, 0);
#else
  auto* saved = reinterpret_cast<uintptr_t*>(stack_ + bytes) - kSavedWords;
  std::fill_n(saved, kSavedWords, 0);
  saved[kReturnAddress] = reinterpret_cast<uintptr_t>(&Fiber::run);
  registers_ = saved;
#endif
}

void Fiber::switch_to(Fiber& other) {
  from = this;
  to = &other;
#if defined(MOR_SANITIZE)
  __sanitizer_start_switch_fiber(&fake_stack_, other.bottom_, other.bytes_);
#endif
#if defined(MOR_SIMT_UCONTEXT)
  registers_ = registers_ == nullptr ? new ucontext_t : registers_;
  swapcontext(static_cast<ucontext_t*>(registers_), static_cast<ucontext_t*>(other.registers_));
#else
  mor_simt_switch(&registers_, other.registers_);
#endif
  arrive();
}

void Fiber::run() {
  arrive();
  to->entry_();
  std::abort();  // entry must not return
}

void Fiber::arrive() {
#if defined(MOR_SANITIZE)
  __sanitizer_finish_switch_fiber(to->fake_stack_, &from->bottom_, &from->bytes_);
#endif
}

// Calls that were left in the middle have marked parts of the stack as out of bounds.
void Fiber::unpoison() {
#if defined(MOR_SANITIZE)
  const bool on_stack = registers_ >= stack_ && registers_ < stack_ + kStackBytes;
  char* used = on_stack ? static_cast<char*>(registers_) : stack_;
  __asan_unpoison_memory_region(used, static_cast<size_t>(stack_ + kStackBytes - used));
#endif
}

}  // namespace mor::simt
