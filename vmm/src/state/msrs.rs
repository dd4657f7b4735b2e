//! Model-specific registers: which there are, and how they are read and written in bulk.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{Error, Result};

/// IA32_TIME_STAMP_COUNTER (Intel SDM, volume 4).
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;

/// How many registers one ioctl carries; the kernel takes 256 (MAX_IO_MSRS of arch/x86/kvm/x86.c).
const BATCH: usize = 128;

/// Reads registers in order; those the host refuses are left out.
///
/// # Errors
/// [`Error::Host`] when the ioctl as such fails.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<kvm_msr_entry> =
            batch.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = wrap(&entries)?;
        let done = vcpu.get_msrs(&mut msrs).map_err(Error::kvm("read model-specific registers"))?;
        values.extend(msrs.as_slice().iter().take(done).map(|entry| (entry.index, entry.data)));
        rest = &rest[done.min(batch.len())..];
        if done < batch.len()
            && let Some((refused, after)) = rest.split_first()
        {
            tracing::debug!(msr = format_args!("{refused:#x}"), "the host does not let it be read");
            rest = after;
        }
    }
    Ok(values)
}

/// Which of the host's registers can be read on such a vCPU, in the order in which they must be written.
///
/// # Errors
/// As [`read`].
pub(crate) fn readable(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<u32>> {
    let mut indices: Vec<u32> = read(vcpu, indices)?.into_iter().map(|(index, _)| index).collect();
    indices.sort_by_key(|index| write_order(*index));
    Ok(indices)
}

/// TSC first, TSC_DEADLINE last; see the ordering requirements of [`super`].
pub(crate) fn write_order(index: u32) -> u8 {
    match index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    }
}

/// Writes registers in order. One that the host refuses does no harm if it is zero there or already has
/// that value; any other is an error.
///
/// # Errors
/// [`Error::State`] that names the register.
pub(crate) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<()> {
    let mut rest = values;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<kvm_msr_entry> = batch
            .iter()
            .map(|(index, data)| kvm_msr_entry { index: *index, data: *data, ..Default::default() })
            .collect();
        let done = vcpu.set_msrs(&wrap(&entries)?).map_err(Error::kvm("write model-specific registers"))?;
        rest = &rest[done.min(batch.len())..];
        if done < batch.len()
            && let Some(((index, value), after)) = rest.split_first()
        {
            let has = read(vcpu, &[*index])?.first().map(|(_, value)| *value);
            if *value != 0 && has != Some(*value) {
                return Err(Error::State(format!(
                    "this host refuses model-specific register {index:#x} = {value:#x}, which the guest uses"
                )));
            }
            tracing::debug!(msr = format_args!("{index:#x}"), "the host does not let it be written");
            rest = after;
        }
    }
    Ok(())
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries).map_err(|error| Error::State(format!("MSRs: {error:?}")))
}
