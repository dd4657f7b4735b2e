//! The 64-bit start: descriptor tables, identity page tables, and the registers that use them.
//!
//! Every level of the page tables has the user bit, and the descriptors have a user half, so that a flat
//! image can start at CPL 3. The layout of the selectors is Linux's (asm/segment.h).

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};

use crate::{
    addresses::{
        BOOT_GDT, BOOT_IDT, BOOT_PD, BOOT_PD_MAX, BOOT_PDPT, BOOT_PML4, BOOT_STACK_TOP, BOOT_TSS, HOLE_END,
        PAGE_SIZE, PVH_START_INFO, ZERO_PAGE,
    },
    error::Result,
    memory::GuestMemory,
};

/// The privilege level at which a flat image starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ring {
    /// CPL 0.
    Kernel,
    /// CPL 3: no exceptions, no port I/O. Some back ends run only this at full speed.
    User,
}

// Selectors; the low two bits are the privilege level asked for.
const KERNEL_CODE: u16 = 0x10;
const KERNEL_DATA: u16 = 0x18;
const USER_DATA: u16 = 0x2b;
const USER_CODE: u16 = 0x33;
const TASK: u16 = 0x40;

// Segment types (AMD64 manual, volume 2, tables 4-3 to 4-6).
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// CR0: PG, AM, WP, NE, ET, MP, PE. The set a kernel of today runs with.
const CR0: u64 = 0x8005_0033;
/// CR4: OSXMMEXCPT, OSFXSR, PGE, PAE: SSE may be used at once.
const CR4: u64 = 0x6a0;
/// EFER: LMA, LME, SCE.
const EFER: u64 = 0x501;
/// RFLAGS: only the bit that is always one. Interrupts are off.
const RFLAGS: u64 = 0x2;

// Page table bits (AMD64 manual, volume 2, 5.4).
const PRESENT_WRITABLE_USER: u64 = 0x7;
const LARGE_PAGE: u64 = 0x80;

const GIB: u64 = 1 << 30;
const MIB_2: u64 = 2 << 20;
const ENTRIES: u64 = 512;

fn segment(selector: u16, kind: u8, code: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: u8::try_from(selector & 3).unwrap_or(0),
        db: u8::from(!code),
        s: 1,
        l: u8::from(code),
        g: 1,
        ..Default::default()
    }
}

fn task_segment() -> kvm_segment {
    kvm_segment {
        base: BOOT_TSS,
        limit: 0x67,
        selector: TASK,
        type_: TYPE_BUSY_TSS,
        present: 1,
        ..Default::default()
    }
}

/// A segment as the eight bytes of its descriptor.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

/// Writes the descriptor tables and the page tables.
pub(super) fn write_tables(memory: &GuestMemory) -> Result<()> {
    let mut gdt = [0_u64; 10];
    for segment in [
        segment(KERNEL_CODE, TYPE_CODE, true),
        segment(KERNEL_DATA, TYPE_DATA, false),
        segment(USER_DATA, TYPE_DATA, false),
        segment(USER_CODE, TYPE_CODE, true),
        task_segment(),
    ] {
        if let Some(slot) = gdt.get_mut(usize::from(segment.selector >> 3)) {
            *slot = descriptor(&segment);
        }
    }
    write_words(memory, BOOT_GDT, gdt)?;
    write_words(memory, BOOT_IDT, [0; 512])?;
    write_words(memory, BOOT_TSS, [0; 13])?;

    let top = memory.layout().iter().map(|space| space.base + space.pages * PAGE_SIZE).max().unwrap_or(0);
    let gibs = top.max(HOLE_END).div_ceil(GIB).min(BOOT_PD_MAX);
    write_words(memory, BOOT_PML4, [BOOT_PDPT | PRESENT_WRITABLE_USER])?;
    let directory = |gib: u64| BOOT_PD + gib * PAGE_SIZE;
    write_words(memory, BOOT_PDPT, (0..gibs).map(|gib| directory(gib) | PRESENT_WRITABLE_USER))?;
    for gib in 0..gibs {
        let entries =
            (0..ENTRIES).map(|entry| (gib * GIB + entry * MIB_2) | LARGE_PAGE | PRESENT_WRITABLE_USER);
        write_words(memory, directory(gib), entries)?;
    }
    Ok(())
}

fn write_words(memory: &GuestMemory, address: u64, words: impl IntoIterator<Item = u64>) -> Result<()> {
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    memory.write(address, &bytes)
}

/// Registers of a vCPU that starts an ELF image at its 64-bit entry.
pub(super) fn elf_registers(entry: u64, sregs: &mut kvm_sregs) -> kvm_regs {
    enter(Ring::Kernel, sregs);
    kvm_regs {
        rip: entry,
        rsp: BOOT_STACK_TOP,
        rbx: PVH_START_INFO,
        rdi: PVH_START_INFO,
        rsi: ZERO_PAGE,
        rflags: RFLAGS,
        ..Default::default()
    }
}

/// Registers of a vCPU that starts a flat image.
pub(super) fn flat_registers(entry: u64, ring: Ring, vcpu: u32, sregs: &mut kvm_sregs) -> kvm_regs {
    enter(ring, sregs);
    kvm_regs {
        rip: entry,
        rsp: BOOT_STACK_TOP.saturating_sub(u64::from(vcpu % 8) * PAGE_SIZE),
        rdi: vcpu.into(),
        rsi: PVH_START_INFO,
        rflags: RFLAGS,
        ..Default::default()
    }
}

fn enter(ring: Ring, sregs: &mut kvm_sregs) {
    let (code, data) = match ring {
        Ring::Kernel => (KERNEL_CODE, KERNEL_DATA),
        Ring::User => (USER_CODE, USER_DATA),
    };
    sregs.cs = segment(code, TYPE_CODE, true);
    let data = segment(data, TYPE_DATA, false);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = task_segment();
    sregs.gdt = kvm_dtable { base: BOOT_GDT, limit: 10 * 8 - 1, ..Default::default() };
    sregs.idt = kvm_dtable { base: BOOT_IDT, limit: 0xfff, ..Default::default() };
    sregs.cr0 = CR0;
    sregs.cr3 = BOOT_PML4;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_those_of_the_manual() {
        assert_eq!(descriptor(&segment(KERNEL_CODE, TYPE_CODE, true)), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&segment(USER_DATA, TYPE_DATA, false)), 0x00cf_f300_0000_ffff);
        assert_eq!(descriptor(&task_segment()), 0x0000_8b00_3000_0067);
    }

    #[test]
    fn page_tables_cover_the_hole_and_all_memory_with_user_bits() {
        let memory = GuestMemory::create(5 << 30).unwrap();
        write_tables(&memory).unwrap();
        let word = |address| {
            let mut bytes = [0; 8];
            memory.read(address, &mut bytes).unwrap();
            u64::from_le_bytes(bytes)
        };
        assert_eq!(word(BOOT_PML4), BOOT_PDPT | 7);
        assert_eq!(word(BOOT_PDPT + 5 * 8), (BOOT_PD + 5 * 4096) | 7);
        assert_eq!(word(BOOT_PDPT + 6 * 8), 0);
        assert_eq!(word(BOOT_PD + 3 * 4096 + 8), (3 * GIB + MIB_2) | 0x87);
    }
}
