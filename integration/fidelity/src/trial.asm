# Runs trials: sets the extended registers, executes one instruction, reads everything back.
# Position-independent and without data, so that a guest can run a copy of it.
#
# amx_fidelity_run(rdi: trials, rsi: how many), System V calling convention. Fields of a trial:
#   0 instruction, as an offset from amx_fidelity_code   8 area that is loaded at first, or 0
#  16 its XSTATE_BV                                     24 operand (rdi)
#  32 second operand (rsi)                              40 edx:eax
#  48 IA32_XFD                                          56 flags: 1 = CPL 0, 2 = CR0.TS
#  64 area for all registers afterwards, or 0           72 area with the initial state
#  80 fault, 88 IA32_XFD_ERR, 96 XGETBV(1)             104 next trial
.pushsection .text.amx_fidelity, "ax", @progbits
.balign 4096
.globl amx_fidelity_code, amx_fidelity_run, amx_fidelity_end
amx_fidelity_code:
amx_fidelity_run:
    push rbx
    push rbp
    push r12
    push r13
    mov rbx, rdi
    mov r12, rsi
    mov rbp, rsp
20: test r12, r12
    jz 29f
    # The first state. IA32_XFD is 0 here, or this is a process that never had tiles.
    mov rdi, [rbx + 8]
    test rdi, rdi
    jz 21f
    mov rax, [rbx + 16]
    mov [rdi + 512], rax
    mov eax, 0xffffffff
    mov edx, eax
    xrstor64 [rdi]
21: test byte ptr [rbx + 56], 1
    jz 22f
    mov ecx, 0x1c5
    xor eax, eax
    xor edx, edx
    wrmsr
    mov eax, [rbx + 48]
    test eax, eax
    jz 22f
    mov ecx, 0x1c4
    wrmsr
22: test byte ptr [rbx + 56], 2
    jz 23f
    mov rax, cr0
    or rax, 8
    mov cr0, rax
23: mov rdi, [rbx + 24]
    mov rsi, [rbx + 32]
    mov eax, [rbx + 40]
    mov edx, [rbx + 44]
    lea rcx, [rip + amx_fidelity_code]
    add rcx, [rbx]
    lea r11, [rip + 24f]
    movabs r10, 0x616d782d66696465
    call rcx
24: mov rsp, rbp
    mov [rbx + 80], r10
    xor r10d, r10d
    test byte ptr [rbx + 56], 1
    jz 25f
    clts
    mov ecx, 0x1c5
    rdmsr
    mov [rbx + 88], eax
    mov [rbx + 92], edx
25: mov ecx, 1
    xgetbv
    mov [rbx + 96], eax
    mov [rbx + 100], edx
    test byte ptr [rbx + 56], 1
    jz 26f
    cmp dword ptr [rbx + 48], 0
    je 26f
    xor eax, eax
    xor edx, edx
    mov ecx, 0x1c5
    wrmsr
    mov ecx, 0x1c4
    wrmsr
26: mov eax, 0xffffffff
    mov edx, eax
    mov rdi, [rbx + 64]
    test rdi, rdi
    jz 27f
    xsave64 [rdi]
27: mov rdi, [rbx + 72]
    xrstor64 [rdi]
    add rbx, 104
    dec r12
    jmp 20b
29: pop r13
    pop r12
    pop rbp
    pop rbx
    ret

# The instructions.
.macro amx_fidelity_op name, text:vararg
.globl amx_fidelity_op_\name
amx_fidelity_op_\name:
    \text
    ret
.endm
amx_fidelity_op nothing, nop
amx_fidelity_op xsave, xsave64 [rdi]
amx_fidelity_op xsaveopt, xsaveopt64 [rdi]
amx_fidelity_op xsavec, xsavec64 [rdi]
amx_fidelity_op xsaves, xsaves64 [rdi]
amx_fidelity_op xrstor, xrstor64 [rdi]
amx_fidelity_op xrstors, xrstors64 [rdi]
amx_fidelity_op ldtilecfg, ldtilecfg [rdi]
amx_fidelity_op sttilecfg, sttilecfg [rdi]
amx_fidelity_op tilerelease, tilerelease
amx_fidelity_op tilezero0, tilezero tmm0
amx_fidelity_op tilezero5, tilezero tmm5
amx_fidelity_op tileloadd0, tileloadd tmm0, [rdi + rsi]
amx_fidelity_op tileloadd5, tileloadd tmm5, [rdi + rsi]
amx_fidelity_op tileloaddt1_5, tileloaddt1 tmm5, [rdi + rsi]
amx_fidelity_op tilestored0, tilestored [rdi + rsi], tmm0
amx_fidelity_op tilestored5, tilestored [rdi + rsi], tmm5
# TILELOADD and TILESTORED of tmm5 with a SIB byte that names no index.
amx_fidelity_op tileloadd5_no_index, .byte 0xc4, 0xe2, 0x7b, 0x4b, 0x2c, 0x27
amx_fidelity_op tilestored5_no_index, .byte 0xc4, 0xe2, 0x7a, 0x4b, 0x2c, 0x27
# TILELOADD tmm5, [rdi] without a SIB byte.
amx_fidelity_op tileloadd5_no_sib, .byte 0xc4, 0xe2, 0x7b, 0x4b, 0x2f
amx_fidelity_op tdpbssd, tdpbssd tmm0, tmm1, tmm2
amx_fidelity_op tdpbsud, tdpbsud tmm0, tmm1, tmm2
amx_fidelity_op tdpbusd, tdpbusd tmm0, tmm1, tmm2
amx_fidelity_op tdpbuud, tdpbuud tmm0, tmm1, tmm2
amx_fidelity_op tdpbf16ps, tdpbf16ps tmm0, tmm1, tmm2
amx_fidelity_op tdpfp16ps, tdpfp16ps tmm0, tmm1, tmm2
amx_fidelity_op tcmmrlfp16ps, tcmmrlfp16ps tmm0, tmm1, tmm2
amx_fidelity_op tcmmimfp16ps, tcmmimfp16ps tmm0, tmm1, tmm2
amx_fidelity_op tdpbssd_same, .byte 0xc4, 0xe2, 0x6b, 0x5e, 0xc0
amx_fidelity_op fnop, fnop
amx_fidelity_op vaddps, vaddps zmm16, zmm17, zmm18
amx_fidelity_op breakpoint, int3
# sched_yield, in a process.
.globl amx_fidelity_op_yield, amx_fidelity_op_write_xfd, amx_fidelity_op_write_xfd_err
amx_fidelity_op_yield:
    mov eax, 24
    syscall
    ret
amx_fidelity_op_write_xfd:
    mov ecx, 0x1c4
    wrmsr
    ret
amx_fidelity_op_write_xfd_err:
    mov ecx, 0x1c5
    wrmsr
    ret

# A guest enters here, with rdi and rsi as for amx_fidelity_run, and leaves with OUT to port 10H.
.globl amx_fidelity_guest
amx_fidelity_guest:
    call amx_fidelity_run
    out 0x10, al
    hlt

# The guest's exceptions: 32 entries of 16 bytes. In a trial they end it; elsewhere they leave the
# guest through port 11H with the vector in rax and the address in rcx.
.balign 16
.globl amx_fidelity_vectors
amx_fidelity_vectors:
.set amx_fidelity_vector, 0
.rept 32
    .balign 16
    .if (amx_fidelity_vector == 8) || ((amx_fidelity_vector >= 10) && (amx_fidelity_vector <= 14)) || (amx_fidelity_vector == 17) || (amx_fidelity_vector == 21)
        add rsp, 8
    .endif
    push amx_fidelity_vector
    jmp amx_fidelity_exception
    .set amx_fidelity_vector, amx_fidelity_vector + 1
.endr
amx_fidelity_exception:
    push rax
    movabs rax, 0x616d782d66696465
    cmp rax, r10
    pop rax
    jne 30f
    pop r10
    mov [rsp], r11
    iretq
30: pop rax
    pop rcx
    out 0x11, al
    hlt
.popsection
