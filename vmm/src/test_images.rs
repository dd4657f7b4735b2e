//! Guests for tests: a few instructions each, assembled by hand. They start at CPL 3 in 64-bit mode with
//! the number of their vCPU in `rdi`, see [`vmm::boot`].
#![allow(dead_code, reason = "shared by test binaries, of which each uses some")]

/// Where the images are loaded and start.
pub(crate) const LOAD: u64 = 0x10_0000;
/// The counters of [`counter`]: vCPU n has the first eight bytes of page n from here.
pub(crate) const COUNTERS: u64 = 0x20_0000;
/// The mailbox of [`mailbox`].
pub(crate) const MAILBOX: u64 = 0x30_0000;

const SERIAL: u32 = 0xd000_0000;
const PAD: u32 = 0xd000_1000;

/// Prints a text on the serial port's MMIO twin and powers off with a code.
pub(crate) fn hello(text: &[u8], code: u32) -> Vec<u8> {
    let mut image = vec![0xbb]; // mov ebx, SERIAL
    image.extend(SERIAL.to_le_bytes());
    for byte in text {
        image.extend([0xc6, 0x03, *byte]); // mov byte [rbx], imm8
    }
    image.push(0xba); // mov edx, PAD + POWER_OFF
    image.extend((PAD + 0x10).to_le_bytes());
    image.extend([0xc7, 0x02]); // mov dword [rdx], code
    image.extend(code.to_le_bytes());
    image.extend([0xeb, 0xfe]); // jmp $
    image
}

/// Counts in `rcx` for ever, and stores each count in its counter.
pub(crate) fn counter() -> Vec<u8> {
    vec![
        0x48, 0x89, 0xf8, // mov rax, rdi
        0x48, 0xc1, 0xe0, 0x0c, // shl rax, 12
        0x48, 0x05, 0x00, 0x00, 0x20, 0x00, // add rax, COUNTERS
        0x48, 0xff, 0xc1, // inc rcx
        0x48, 0x89, 0x08, // mov [rax], rcx
        0xeb, 0xf8, // jmp to inc
    ]
}

/// Counts in `rcx`, and reads the pad's magic each time: nearly all of its time goes into MMIO exits.
/// Stops counting when a read did not give the magic.
pub(crate) fn mmio_counter() -> Vec<u8> {
    let mut image = vec![
        0x48, 0x89, 0xf8, // mov rax, rdi
        0x48, 0xc1, 0xe0, 0x0c, // shl rax, 12
        0x48, 0x05, 0x00, 0x00, 0x20, 0x00, // add rax, COUNTERS
        0xbb, // mov ebx, PAD
    ];
    image.extend(PAD.to_le_bytes());
    image.extend([
        0x8b, 0x13, // mov edx, [rbx]
        0x81, 0xfa, // cmp edx, magic
        0x4d, 0x47, 0x52, 0x31, //
        0x75, 0xfe, // jne $
        0x48, 0xff, 0xc1, // inc rcx
        0x48, 0x89, 0x08, // mov [rax], rcx
        0xeb, 0xee, // jmp to the read
    ]);
    image
}

/// Looks at the mailbox: an address there gets its eight bytes incremented, then the mailbox is zeroed.
/// In between it parks for 100 us at a time.
pub(crate) fn mailbox() -> Vec<u8> {
    let mut image = vec![0xba]; // mov edx, MAILBOX
    image.extend(u32::try_from(MAILBOX).unwrap_or(0).to_le_bytes());
    image.push(0xbe); // mov esi, PAD + PARK_NS
    image.extend((PAD + 8).to_le_bytes());
    image.push(0xb8); // mov eax, 100_000
    image.extend(100_000_u32.to_le_bytes());
    image.extend([
        0x48, 0x8b, 0x1a, // mov rbx, [rdx]
        0x48, 0x85, 0xdb, // test rbx, rbx
        0x74, 0x0c, // jz to the park
        0x48, 0xff, 0x03, // inc qword [rbx]
        0x48, 0xc7, 0x02, 0, 0, 0, 0, // mov qword [rdx], 0
        0xeb, 0xec, // jmp to the look
        0x48, 0x89, 0x06, // mov [rsi], rax
        0xeb, 0xe7, // jmp to the look
    ]);
    image
}

/// Parks for one second at a time, for ever.
pub(crate) fn sleeper() -> Vec<u8> {
    let mut image = vec![0xbe]; // mov esi, PAD + PARK_NS
    image.extend((PAD + 8).to_le_bytes());
    image.extend([0x48, 0xc7, 0xc0]); // mov rax, 1_000_000_000
    image.extend(1_000_000_000_u32.to_le_bytes());
    image.extend([
        0x48, 0x89, 0x06, // mov [rsi], rax
        0xeb, 0xfb, // jmp to the park
    ]);
    image
}

/// Executes an undefined instruction: with an empty IDT that is a triple fault.
pub(crate) fn crash() -> Vec<u8> {
    vec![0x0f, 0x0b]
}
