# Guest programs that leave through OUT, a port for each step. They go on behind it, in the same VM or in
# another one that was given their state.
.pushsection .text.amx_fidelity, "ax", @progbits

# The steps of the kernel's selftest for AMX (tools/testing/selftests/kvm/x86/amx_test.c).
#   rdi: configuration, rsi: a tile in memory, r8: an area, r9: notes, 8 bytes each
.macro amx_fidelity_read_msr number, note
    mov ecx, \number
    rdmsr
    mov [r9 + 8 * \note], eax
    mov [r9 + 8 * \note + 4], edx
.endm
.macro amx_fidelity_write_msr number, value
    mov ecx, \number
    mov eax, \value
    xor edx, edx
    wrmsr
.endm
.macro amx_fidelity_cpuid leaf, subleaf, note
    mov eax, \leaf
    mov ecx, \subleaf
    cpuid
    mov [r9 + 8 * \note], eax
    mov [r9 + 8 * \note + 4], ebx
    mov [r9 + 8 * \note + 8], ecx
    mov [r9 + 8 * \note + 12], edx
.endm
.globl amx_fidelity_selftest
amx_fidelity_selftest:
    amx_fidelity_cpuid 0xd, 0, 16
    amx_fidelity_cpuid 0xd, 17, 18
    amx_fidelity_cpuid 0xd, 18, 20
    amx_fidelity_cpuid 0x1d, 0, 22
    amx_fidelity_cpuid 0x1d, 1, 24
    amx_fidelity_read_msr 0x1c4, 0
    mov r12d, 64
    out 0x21, al
    # IA32_XFD is still 0.
    amx_fidelity_read_msr 0x1c4, 1
    ldtilecfg [rdi]
    out 0x22, al
    tileloadd tmm0, [rsi + r12]
    out 0x23, al
    amx_fidelity_write_msr 0x1c4, 0x40000
    out 0x24, al
    # The same area twice: with IA32_XFD 0, then with tile data disabled.
    amx_fidelity_write_msr 0x1c4, 0
    ldtilecfg [rdi]
    tileloadd tmm0, [rsi + r12]
    tilerelease
    mov eax, 0x60000
    xor edx, edx
    xsavec64 [r8]
    out 0x25, al
    amx_fidelity_write_msr 0x1c4, 0x40000
    mov eax, 0x60000
    xor edx, edx
    xsavec64 [r8]
    out 0x26, al
    ldtilecfg [rdi]
    lea r11, [rip + 40f]
    movabs r10, 0x616d782d66696465
    tileloadd tmm0, [rsi + r12]
40: mov [r9 + 8 * 2], r10
    xor r10d, r10d
    mov rax, cr0
    mov [r9 + 8 * 3], rax
    amx_fidelity_read_msr 0x1c5, 4
    amx_fidelity_read_msr 0x1c4, 5
    out 0x27, al
    amx_fidelity_read_msr 0x1c5, 6
    amx_fidelity_read_msr 0x1c4, 7
    amx_fidelity_write_msr 0x1c5, 0
    amx_fidelity_write_msr 0x1c4, 0
    out 0x28, al
    tileloadd tmm0, [rsi + r12]
    tilestored [r8 + r12], tmm0
    out 0x29, al
    hlt

# To CPL 3, where OUT leaves the guest twice, so that it is entered there.
.globl amx_fidelity_sysret
amx_fidelity_sysret:
    lea rcx, [rip + 41f]
    mov r11d, 0x3002
    sysretq
41: out 0x31, al
    out 0x32, al
    jmp 41b

# Counts rcx down to zero and rax up by as much, then leaves.
.globl amx_fidelity_count
amx_fidelity_count:
42: inc rax
    dec rcx
    jnz 42b
    out 0x41, al
    hlt
.popsection
