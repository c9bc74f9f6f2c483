# The whole "BIOS" (64 KiB at 0xF0000): no self-test, no tables. It switches to 64-bit mode with the page tables at 0x103000 and
# jumps to the uncompressed kernel that the emulator has put into RAM (src/boot_image.rs prepares these pages).
        .code16
        .section .text
        .globl _start
_start:
entry:  cli
        movw %cs, %ax
        movw %ax, %ds
        lgdtl gdtr - _start
        movl %cr0, %eax
        andl $0x9fffffff, %eax       # caches on
        orb $1, %al
        movl %eax, %cr0
        ljmpl $0x08, $(0xf0000 + pm - _start)
        .code32
pm:     movw $0x18, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        cmpl $0, 0x102108            # been here before: the kernel has reset the machine
        je first
        movl $3, 0xe0000014          # the channel's exit register; 3 says so to the host program
first:  movl $1, 0x102108
        movl $0x20, %eax             # PAE
        movl %eax, %cr4
        movl $0x103000, %eax
        movl %eax, %cr3
        movl $0x2ff, %ecx            # MTRRs: all memory write-back
        movl $0x806, %eax
        xorl %edx, %edx
        wrmsr
        movl $0xc0000080, %ecx
        rdmsr
        orl $0x100, %eax             # LME
        wrmsr
        movl %cr0, %eax
        orl $0x80000000, %eax
        movl %eax, %cr0
        ljmpl $0x10, $(0xf0000 + lm - _start)
        .code64
lm:     movl $0x100000, %esi         # boot_params
        movl $0x102100, %eax
        jmp *(%rax)
        .balign 8
gdtr:   .word 31
        .long 0x102000
        .org 0xfff0
        .code16
        ljmp $0xf000, $(entry - _start)
        .org 0xffff
        .byte 0
