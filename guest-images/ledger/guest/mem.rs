//! The memory functions the compiler calls by name; there is no C library here.
//!
//! String instructions, because a loop written in Rust could be compiled into a call of itself. They move
//! eight bytes a step, so that an interrupted one leaves no half-written word.

use core::arch::asm;

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(dest: *mut u8, src: *const u8, bytes: usize) -> *mut u8 {
    // SAFETY: the caller gives `bytes` bytes at both; the direction flag is clear (ABI).
    unsafe {
        asm!("rep movsq", "mov ecx, edx", "rep movsb",
            inout("rcx") bytes / 8 => _, in("edx") bytes % 8, inout("rdi") dest => _, inout("rsi") src => _,
            options(nostack, preserves_flags));
    }
    dest
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(dest: *mut u8, src: *const u8, bytes: usize) -> *mut u8 {
    if (dest as usize).wrapping_sub(src as usize) >= bytes {
        // SAFETY: as for this function; copying upwards never reads what it has overwritten.
        return unsafe { memcpy(dest, src, bytes) };
    }
    // SAFETY: as for this function, bytes > 0 here; the direction flag is clear again at the end.
    unsafe {
        asm!("lea rdi, [rdi + rcx - 1]", "lea rsi, [rsi + rcx - 1]", "std", "rep movsb", "cld",
            inout("rcx") bytes => _, inout("rdi") dest => _, inout("rsi") src => _, options(nostack));
    }
    dest
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(dest: *mut u8, byte: i32, bytes: usize) -> *mut u8 {
    let pattern = (byte as u64 & 0xff) * 0x0101_0101_0101_0101;
    // SAFETY: the caller gives `bytes` bytes; the direction flag is clear (ABI).
    unsafe {
        asm!("rep stosq", "mov ecx, edx", "rep stosb",
            inout("rcx") bytes / 8 => _, in("edx") bytes % 8, inout("rdi") dest => _, in("rax") pattern,
            options(nostack, preserves_flags));
    }
    dest
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    let mut i = 0;
    while i < bytes {
        // SAFETY: the caller gives `bytes` bytes at `left`. Volatile: not to be made a call of memcmp.
        let l = unsafe { left.wrapping_add(i).read_volatile() };
        // SAFETY: the same at `right`.
        let r = unsafe { right.wrapping_add(i).read_volatile() };
        if l != r {
            return i32::from(l) - i32::from(r);
        }
        i += 1;
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, bytes: usize) -> i32 {
    // SAFETY: as for this function.
    unsafe { memcmp(left, right, bytes) }
}

/// Named by `core`, which was compiled for unwinding; nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
