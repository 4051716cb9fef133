/*
 * The exported nccl* and pnccl* symbols: each jumps through its slot without touching an argument, so that no signature
 * has to be known. A slot begins at code that asks fuscoNcclResolve(index) for the target, once, with all argument
 * registers kept; fuscoNcclMissing holds for each function the address that answers when the real library has it not.
 */
#define NCCL_PASS(name, major, minor) forwarder name
#define NCCL_FACE(name, major, minor) forwarder name
#define NCCL_HOST(name, major, minor) forwarder name

  .set index, 0

#if defined(__x86_64__)

.macro forwarder name
  .text
  .p2align 4
  .globl nccl\name, pnccl\name
  .type nccl\name, @function
  .type pnccl\name, @function
nccl\name:
pnccl\name:
  endbr64
  jmp *.Lslot\name(%rip)
  .size nccl\name, . - nccl\name
  .size pnccl\name, . - pnccl\name
.Lfirst\name:
  endbr64
  movl $index, %r11d
  jmp .Lresolve
.Lmissing\name:
  endbr64
  movl $index, %edi
  jmp fuscoNcclAnswerMissing
  .section .data.fusco_slots, "aw", @progbits
.Lslot\name:
  .quad .Lfirst\name
  .section .data.rel.ro.fusco_missing, "aw", @progbits
  .quad .Lmissing\name
  .set index, index + 1
.endm

  .text
  .p2align 4
  .type .Lresolve, @function
.Lresolve:
  .cfi_startproc
  pushq %rbp
  .cfi_def_cfa_offset 16
  .cfi_offset %rbp, -16
  movq %rsp, %rbp
  .cfi_def_cfa_register %rbp
  pushq %rdi
  pushq %rsi
  pushq %rdx
  pushq %rcx
  pushq %r8
  pushq %r9
  pushq %rax
  pushq %r10
  subq $128, %rsp
  movups %xmm0, (%rsp)
  movups %xmm1, 16(%rsp)
  movups %xmm2, 32(%rsp)
  movups %xmm3, 48(%rsp)
  movups %xmm4, 64(%rsp)
  movups %xmm5, 80(%rsp)
  movups %xmm6, 96(%rsp)
  movups %xmm7, 112(%rsp)
  movl %r11d, %edi
  call fuscoNcclResolve
  movq %rax, %r11
  movups (%rsp), %xmm0
  movups 16(%rsp), %xmm1
  movups 32(%rsp), %xmm2
  movups 48(%rsp), %xmm3
  movups 64(%rsp), %xmm4
  movups 80(%rsp), %xmm5
  movups 96(%rsp), %xmm6
  movups 112(%rsp), %xmm7
  addq $128, %rsp
  popq %r10
  popq %rax
  popq %r9
  popq %r8
  popq %rcx
  popq %rdx
  popq %rsi
  popq %rdi
  popq %rbp
  .cfi_def_cfa %rsp, 8
  jmp *%r11
  .cfi_endproc
  .size .Lresolve, . - .Lresolve

#elif defined(__aarch64__)

/* hint #34 is bti c, by a name that every assembler knows. */
.macro forwarder name
  .text
  .p2align 4
  .globl nccl\name, pnccl\name
  .type nccl\name, %function
  .type pnccl\name, %function
nccl\name:
pnccl\name:
  hint #34
  adrp x16, .Lslot\name
  ldr x16, [x16, #:lo12:.Lslot\name]
  br x16
  .size nccl\name, . - nccl\name
  .size pnccl\name, . - pnccl\name
.Lfirst\name:
  hint #34
  mov w17, #index
  b .Lresolve
.Lmissing\name:
  hint #34
  mov w0, #index
  b fuscoNcclAnswerMissing
  .section .data.fusco_slots, "aw", %progbits
.Lslot\name:
  .xword .Lfirst\name
  .section .data.rel.ro.fusco_missing, "aw", %progbits
  .xword .Lmissing\name
  .set index, index + 1
.endm

  .text
  .p2align 4
  .type .Lresolve, %function
.Lresolve:
  .cfi_startproc
  stp x29, x30, [sp, #-224]!
  .cfi_def_cfa_offset 224
  .cfi_offset x29, -224
  .cfi_offset x30, -216
  mov x29, sp
  stp x0, x1, [sp, #16]
  stp x2, x3, [sp, #32]
  stp x4, x5, [sp, #48]
  stp x6, x7, [sp, #64]
  str x8, [sp, #80]
  stp q0, q1, [sp, #96]
  stp q2, q3, [sp, #128]
  stp q4, q5, [sp, #160]
  stp q6, q7, [sp, #192]
  mov w0, w17
  bl fuscoNcclResolve
  mov x16, x0
  ldp x0, x1, [sp, #16]
  ldp x2, x3, [sp, #32]
  ldp x4, x5, [sp, #48]
  ldp x6, x7, [sp, #64]
  ldr x8, [sp, #80]
  ldp q0, q1, [sp, #96]
  ldp q2, q3, [sp, #128]
  ldp q4, q5, [sp, #160]
  ldp q6, q7, [sp, #192]
  ldp x29, x30, [sp], #224
  .cfi_restore x30
  .cfi_restore x29
  .cfi_def_cfa_offset 0
  br x16
  .cfi_endproc
  .size .Lresolve, . - .Lresolve

#else
#error "libfusco has forwarders for x86-64 and aarch64"
#endif

  .section .data.fusco_slots, "aw"
  .p2align 3
  .globl fuscoNcclSlots
  .hidden fuscoNcclSlots
fuscoNcclSlots:
  .section .data.rel.ro.fusco_missing, "aw"
  .p2align 3
  .globl fuscoNcclMissing
  .hidden fuscoNcclMissing
fuscoNcclMissing:

#include "plugin/nccl/functions.inc"

  .section .note.GNU-stack, "", %progbits
