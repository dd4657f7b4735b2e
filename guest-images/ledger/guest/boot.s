# From the VMM's entry points to CPL 3.
#
# On a page-table based back end of KVM every instruction here is emulated (about 0.5 us each), while
# CPL 3 runs natively. So nothing loops here: the page tables of the first 4 GiB are data, and all else is
# done by Rust code at CPL 3.

.section .note.pvh, "a", @note
    .balign 4
    .long 4                     # bytes in the name
    .long 8                     # bytes in the value
    .long 18                    # XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h)
    .asciz "Xen"
    .quad pvh_entry

.section .text.boot, "ax"

# PVH: 32-bit protected mode, flat segments, paging off, EBX = start info.
.code32
.global pvh_entry
pvh_entry:
    cli
    cld
    mov eax, 0x6a0              # CR4: PAE, PGE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080         # EFER
    mov eax, 0x101              # SCE (for SYSRETQ), LME
    xor edx, edx
    wrmsr
    lgdt [gdt_pointer]
    mov eax, 0x80050033         # CR0: PG, AM, WP, NE, ET, MP, PE; not EM, not TS: SSE is usable
    mov cr0, eax
    .byte 0xea                  # far jump to 64-bit code
    .long entry64
    .word 0x10

# The ELF entry: 64-bit mode, CPL 0, the first 4 MiB identity-mapped, RBX = start info.
.code64
.global entry64
entry64:
    cli
    cld
    mov eax, 0x6a0
    mov cr4, rax
    mov eax, offset pml4
    mov cr3, rax
    lgdt [gdt_pointer]
    mov ecx, 0xc0000080
    mov eax, 0x501              # SCE, LME, LMA
    xor edx, edx
    wrmsr
    mov eax, 0x80050033
    mov cr0, rax
    mov ecx, 0xc0000081         # STAR: SYSRETQ loads CS = 0x23 + 16, SS = 0x23 + 8
    xor eax, eax
    mov edx, 0x00230010
    wrmsr

    mov dx, 0x3f8               # one line on COM1, for VMMs that have no other way to be told
    mov al, 'l'
    out dx, al
    mov al, 'e'
    out dx, al
    mov al, 'd'
    out dx, al
    mov al, 'g'
    out dx, al
    mov al, 'e'
    out dx, al
    mov al, 'r'
    out dx, al
    mov al, 10
    out dx, al

    mov ecx, offset ring3       # RCX -> RIP
    mov r11d, 0x3002            # R11 -> RFLAGS: IOPL 3, interrupts off
    sysretq

ring3:
    mov edi, ebx                # below 4 GiB; the upper half is undefined after 32-bit mode
    mov esp, offset stack_end   # 16-byte aligned before the call, as the ABI wants it
    xor ebp, ebp
    call ledger_main
    ud2

.section .data.tables, "aw"

# Present, writable, user, accessed, dirty at every level, so that no walk has anything to write back.
    .balign 4096
pml4:
    .quad pdpt + 0x67
    .fill 511, 8, 0
.global pdpt
pdpt:
    .quad pd + 0x0067
    .quad pd + 0x1067
    .quad pd + 0x2067
    .quad pd + 0x3067
    .fill 508, 8, 0
pd:                             # 2 MiB pages from 0 to 4 GiB; the devices' one uncached (PCD, PWT)
    .set address, 0
    .rept 2048
    .if address == 0xd0000000
    .quad address + 0xff
    .else
    .quad address + 0xe7
    .endif
    .set address, address + 0x200000
    .endr

    .balign 16
gdt:
    .quad 0
    .quad 0x00cf9b000000ffff    # 08 kernel code, 32 bits
    .quad 0x00af9b000000ffff    # 10 kernel code, 64 bits
    .quad 0x00cf93000000ffff    # 18 kernel data
    .quad 0x00cffb000000ffff    # 20 user code, 32 bits
    .quad 0x00cff3000000ffff    # 28 user data
    .quad 0x00affb000000ffff    # 30 user code, 64 bits
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .quad gdt

.section .bss.stack, "aw", @nobits
    .balign 4096
    .skip 65536
stack_end:
