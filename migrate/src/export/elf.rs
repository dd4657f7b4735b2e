//! An ELF core of a VM: what stands in front of its memory.
//!
//! Sources: elf(5), and linux/elfcore.h and sys/procfs.h of x86-64 for the note of a thread. Addresses are guest-physical, because those are
//! what a checkpoint knows; a debugger that has the guest kernel's symbols translates by CR3 itself.

use protocol::layout::Space;
use protocol::page::{PAGE_SIZE, SpaceId};
use vmm::state::VcpuState;

const EHDR_BYTES: usize = 64;
const PHDR_BYTES: usize = 56;

const ET_CORE: u16 = 4;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Readable, writable, executable.
const PF_RWX: u32 = 7;
const NT_PRSTATUS: u32 = 1;

/// sizeof(struct elf_prstatus), and where its members pr_pid and pr_reg lie.
const PRSTATUS_BYTES: usize = 336;
const PR_PID: usize = 32;
const PR_REG: usize = 112;

/// The head of a core, and where each space lies behind it.
pub(super) struct Core {
    head: Vec<u8>,
    offsets: Vec<(SpaceId, u64)>,
    bytes: u64,
}

impl Core {
    pub(super) fn new(spaces: &[Space], vcpus: &[VcpuState]) -> Self {
        let notes: Vec<u8> =
            vcpus.iter().enumerate().flat_map(|(number, vcpu)| note(number as u32 + 1, vcpu)).collect();
        let notes_at = (EHDR_BYTES + (spaces.len() + 1) * PHDR_BYTES) as u64;
        let mut next = (notes_at + notes.len() as u64).next_multiple_of(PAGE_SIZE as u64);
        let mut head = header(spaces.len() as u16 + 1);
        program_header(&mut head, PT_NOTE, notes_at, 0, notes.len() as u64);
        let mut offsets = Vec::with_capacity(spaces.len());
        for space in spaces {
            let bytes = space.pages * PAGE_SIZE as u64;
            program_header(&mut head, PT_LOAD, next, space.guest_address, bytes);
            offsets.push((space.id, next));
            next += bytes;
        }
        head.extend(notes);
        Self { head, offsets, bytes: next }
    }

    /// What stands in front.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Where a space begins.
    pub(super) fn offset(&self, space: SpaceId) -> Option<u64> {
        self.offsets.iter().find(|(id, _)| *id == space).map(|(_, offset)| *offset)
    }

    /// The length of the whole file.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}

fn header(program_headers: u16) -> Vec<u8> {
    // 64 bits, little-endian, version 1.
    let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
    bytes.resize(16, 0);
    bytes.extend_from_slice(&ET_CORE.to_le_bytes());
    bytes.extend_from_slice(&EM_X86_64.to_le_bytes());
    bytes.extend_from_slice(&1_u32.to_le_bytes());
    // No entry; program headers right behind this; no sections.
    bytes.extend_from_slice(&0_u64.to_le_bytes());
    bytes.extend_from_slice(&(EHDR_BYTES as u64).to_le_bytes());
    bytes.extend_from_slice(&0_u64.to_le_bytes());
    bytes.extend_from_slice(&0_u32.to_le_bytes());
    for half in [EHDR_BYTES as u16, PHDR_BYTES as u16, program_headers, 0, 0, 0] {
        bytes.extend_from_slice(&half.to_le_bytes());
    }
    bytes
}

fn program_header(bytes: &mut Vec<u8>, kind: u32, offset: u64, address: u64, length: u64) {
    let (flags, align) = if kind == PT_LOAD { (PF_RWX, PAGE_SIZE as u64) } else { (0, 4) };
    let in_memory = if kind == PT_LOAD { length } else { 0 };
    bytes.extend_from_slice(&kind.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    for word in [offset, address, address, length, in_memory, align] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
}

/// The note of one thread. Its number is that of the vCPU, from 1 on.
fn note(number: u32, vcpu: &VcpuState) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(20 + PRSTATUS_BYTES);
    for word in [5, PRSTATUS_BYTES as u32, NT_PRSTATUS] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    // The name with its end, and padding to a multiple of four.
    bytes.extend_from_slice(b"CORE\0\0\0\0");
    let mut status = vec![0; PR_REG];
    status[PR_PID..PR_PID + 4].copy_from_slice(&number.to_le_bytes());
    let (r, s) = (&vcpu.regs, &vcpu.sregs);
    // struct user_regs_struct. A guest is in no system call.
    let no_call = u64::MAX;
    let registers = [
        r.r15,
        r.r14,
        r.r13,
        r.r12,
        r.rbp,
        r.rbx,
        r.r11,
        r.r10,
        r.r9,
        r.r8,
        r.rax,
        r.rcx,
        r.rdx,
        r.rsi,
        r.rdi,
        no_call,
        r.rip,
        s.cs.selector.into(),
        r.rflags,
        r.rsp,
        s.ss.selector.into(),
        s.fs.base,
        s.gs.base,
        s.ds.selector.into(),
        s.es.selector.into(),
        s.fs.selector.into(),
        s.gs.selector.into(),
    ];
    status.extend(registers.iter().flat_map(|register| register.to_le_bytes()));
    status.resize(PRSTATUS_BYTES, 0);
    bytes.extend(status);
    bytes
}
