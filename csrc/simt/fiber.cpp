// Switching stacks: a few instructions on x86-64 and AArch64, ucontext elsewhere.
#include "simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#if defined(__x86_64__) || defined(__aarch64__)
#define MOR_SIMT_ASSEMBLY 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(MOR_SIMT_ASSEMBLY)
// Saves the caller's registers on its stack and that stack in *save, continues on the stack load.
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
#else
asm(R"(
.text
.globl mor_simt_switch
.hidden mor_simt_switch
.type mor_simt_switch, %function
mor_simt_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size mor_simt_switch, .-mor_simt_switch
)");
#endif
#endif

namespace mor::simt {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 1 << 20;
#else
constexpr size_t kStackBytes = 1 << 17;
#endif

}  // namespace

struct Fiber::Context {
  char* stack = nullptr;  // a guard page, then kStackBytes
  size_t guard = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
#if defined(MOR_SIMT_ASSEMBLY)
  void *own = nullptr, *caller = nullptr;
#else
  ucontext_t own, caller;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void *own_fake = nullptr, *caller_fake = nullptr;
  const void* caller_bottom = nullptr;
  size_t caller_size = 0;
#endif
};

thread_local Fiber::Context* Fiber::starting = nullptr;

Fiber::Fiber() : context_(new Context) {
  context_->guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, context_->guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    delete context_;
    throw std::bad_alloc();
  }
  mprotect(memory, context_->guard, PROT_NONE);
  context_->stack = static_cast<char*>(memory) + context_->guard;
}

Fiber::~Fiber() {
  munmap(context_->stack - context_->guard, context_->guard + kStackBytes);
  delete context_;
}

void Fiber::run() {
  Context* context = starting;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &context->caller_bottom, &context->caller_size);
#endif
  context->entry(context->argument);
  std::abort();  // entry must not return
}

void Fiber::start(void (*entry)(void*), void* argument) {
  context_->entry = entry;
  context_->argument = argument;
#if defined(MOR_SIMT_ASSEMBLY)
  // What mor_simt_switch pops: zeros for the registers, then run() as the return address.
  auto* top = reinterpret_cast<uintptr_t*>(context_->stack + kStackBytes);
#if defined(__x86_64__)
  *--top = 0;  // where run() would return to
  *--top = reinterpret_cast<uintptr_t>(&Fiber::run);
  for (int i = 0; i < 6; ++i) {
    *--top = 0;
  }
#else
  top -= 20;
  for (int i = 0; i < 20; ++i) {
    top[i] = 0;
  }
  top[11] = reinterpret_cast<uintptr_t>(&Fiber::run);  // x30
#endif
  context_->own = top;
#else
  getcontext(&context_->own);
  context_->own.uc_stack.ss_sp = context_->stack;
  context_->own.uc_stack.ss_size = kStackBytes;
  context_->own.uc_link = nullptr;
  makecontext(&context_->own, &Fiber::run, 0);
#endif
#if defined(__SANITIZE_ADDRESS__)
  context_->own_fake = nullptr;
#endif
}

void Fiber::resume() {
  starting = context_;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&context_->caller_fake, context_->stack, kStackBytes);
#endif
#if defined(MOR_SIMT_ASSEMBLY)
  mor_simt_switch(&context_->caller, context_->own);
#else
  swapcontext(&context_->caller, &context_->own);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(context_->caller_fake, nullptr, nullptr);
#endif
}

void Fiber::leave() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&context_->own_fake, context_->caller_bottom,
                                 context_->caller_size);
#endif
#if defined(MOR_SIMT_ASSEMBLY)
  mor_simt_switch(&context_->own, context_->caller);
#else
  swapcontext(&context_->own, &context_->caller);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(context_->own_fake, &context_->caller_bottom,
                                  &context_->caller_size);
#endif
}

}  // namespace mor::simt
