//! The PVH start: 32-bit protected mode, flat segments, paging off, `ebx` at the start_info
//! (Xen's docs/misc/pvh.pandoc, also "x86/HVM direct boot ABI").

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

use crate::addresses::{BOOT_TSS, PVH_START_INFO};

/// CR0: ET and PE.
const CR0: u64 = 0x11;
const RFLAGS: u64 = 0x2;

pub(super) fn registers(entry: u32, sregs: &mut kvm_sregs) -> kvm_regs {
    let flat = |selector: u16, kind: u8| kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x8, 0xb);
    let data = flat(0x10, 0x3);
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    sregs.tr = kvm_segment {
        base: BOOT_TSS,
        limit: 0x67,
        selector: 0x18,
        type_: 0xb,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = CR0;
    sregs.cr4 = 0;
    kvm_regs { rip: entry.into(), rbx: PVH_START_INFO, rflags: RFLAGS, ..Default::default() }
}
