//! What a destination must be able to be, before it gets the first page.

use serde::{Deserialize, Serialize};

use super::{MACHINE_SECTION, VERSION, decode, encode};
use crate::{
    cpuid::{self, CpuModel, Leaf},
    devices::virtio::{self, Description},
    error::{Error, Result},
    host::Host,
};

/// The section with the list of virtio devices, in a description that has [`WITH_DEVICES`].
const DEVICES_SECTION: &str = "devices";
/// Version of the section `machine` in a description whose other sections must be understood.
const WITH_DEVICES: u16 = 2;

/// How far apart two TSC rates may be without scaling, in parts per million: KVM's own tolerance
/// (tsc_tolerance_ppm of arch/x86/kvm/x86.c).
const TSC_TOLERANCE_PPM: u64 = 250;

/// The machine as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Rate of the guest's TSC in kHz.
    pub tsc_khz: u32,
    /// Size of a vCPU's XSAVE area in 32-bit words.
    pub xsave_words: u32,
    /// Processor features, without what differs from vCPU to vCPU.
    pub cpuid: Vec<Leaf>,
}

impl Machine {
    /// The description as bytes: a state container with the section `machine`, and `devices` if there are virtio devices.
    ///
    /// # Errors
    /// [`Error::State`] when it cannot be encoded.
    pub fn encode(&self, devices: &[Description]) -> Result<Vec<u8>> {
        let mut state = protocol::state::State::default();
        if devices.is_empty() {
            state.push(MACHINE_SECTION, VERSION, encode(self)?);
        } else {
            // A VMM that knows nothing of devices does not take this version, and so refuses before the first page.
            state.push(MACHINE_SECTION, WITH_DEVICES, encode(self)?);
            let (version, body) = virtio::encode(devices)?;
            state.push(DEVICES_SECTION, version, body);
        }
        state.encode().map_err(|error| Error::State(error.to_string()))
    }

    /// Reads a description from a peer.
    ///
    /// # Errors
    /// [`Error::State`] that says what is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<(Self, Vec<Description>)> {
        let mut state =
            protocol::state::State::decode(bytes).map_err(|error| Error::State(error.to_string()))?;
        let mut devices = Vec::new();
        // The body is the same in both versions.
        if let Some(machine) = state.sections.iter_mut().find(|section| section.name == MACHINE_SECTION)
            && machine.version == WITH_DEVICES
        {
            machine.version = VERSION;
            let list = state.section(DEVICES_SECTION).ok_or_else(|| {
                Error::State("it says that it has a list of devices, and there is none".into())
            })?;
            devices = virtio::decode(list.version, &list.body)?;
            if let Some(other) = state
                .sections
                .iter()
                .find(|section| ![MACHINE_SECTION, DEVICES_SECTION].contains(&section.name.as_str()))
            {
                return Err(Error::State(format!("section {:?} is unknown here", other.name)));
            }
        }
        Ok((decode(&state, MACHINE_SECTION)?, devices))
    }

    /// Checks that this host can be that machine, and may: `cpu` is the most that it shows guests.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] that names what this host lacks, [`Error::Config`] for too many vCPUs.
    pub fn check(&self, host: &Host, cpu: &CpuModel) -> Result<()> {
        check_vcpus(self.vcpus, host)?;
        cpuid::check(&self.cpuid, &cpuid::offered(host, self.vcpus, cpu)?)?;
        if self.xsave_words as usize > host.xsave_words {
            return Err(Error::MissingFeatures(format!(
                "room for {} bytes of vector registers (it has {})",
                u64::from(self.xsave_words) * 4,
                host.xsave_words * 4
            )));
        }
        Ok(())
    }

    /// Checks that a vCPU here can run at the guest's TSC rate; says whether it must be set.
    ///
    /// # Errors
    /// [`Error::MissingFeatures`] when the rates differ and this host cannot scale.
    pub(crate) fn tsc_must_be_set(&self, host_khz: u32, scaling: bool) -> Result<bool> {
        let difference = u64::from(self.tsc_khz.abs_diff(host_khz));
        if difference * 1_000_000 <= u64::from(host_khz) * TSC_TOLERANCE_PPM {
            return Ok(false);
        }
        if scaling && self.tsc_khz > 0 {
            return Ok(true);
        }
        Err(Error::MissingFeatures(format!(
            "TSC scaling (the guest's TSC runs at {} kHz, this host's at {host_khz} kHz)",
            self.tsc_khz
        )))
    }
}

/// Checks a number of vCPUs against what KVM takes.
///
/// # Errors
/// [`Error::Config`].
pub(crate) fn check_vcpus(vcpus: u32, host: &Host) -> Result<()> {
    // APIC ids above 254 need guests that know x2APIC before they start; see KVM_CAP_X2APIC_API.
    let most = host.max_vcpus.min(254);
    if (1..=most).contains(&vcpus) {
        return Ok(());
    }
    Err(Error::Config(format!("{vcpus} vCPUs: this host's KVM takes 1 to {most}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(tsc_khz: u32) -> Machine {
        Machine { vcpus: 2, tsc_khz, xsave_words: 1024, cpuid: Vec::new() }
    }

    #[test]
    fn a_description_survives_and_a_damaged_one_is_refused() {
        let disk = Description::Block { path: "/a".into(), readonly: false, sectors: 8, features: 1 };
        for devices in [Vec::new(), vec![disk, Description::Rng { features: 0 }]] {
            let bytes = machine(2_000_000).encode(&devices).unwrap();
            assert_eq!(Machine::decode(&bytes).unwrap(), (machine(2_000_000), devices));
            for cut in 0..bytes.len() {
                assert!(Machine::decode(&bytes[..cut]).is_err());
            }
        }
    }

    #[test]
    fn a_description_with_devices_is_nothing_for_who_does_not_know_of_them() {
        let bytes = machine(1).encode(&[Description::Rng { features: 0 }]).unwrap();
        let mut state = protocol::state::State::decode(&bytes).unwrap();
        assert!(decode::<Machine>(&state, MACHINE_SECTION).unwrap_err().to_string().contains("version 2"));
        state.sections.pop();
        assert!(Machine::decode(&state.encode().unwrap()).is_err());
        state.push(DEVICES_SECTION, 2, Vec::new());
        assert!(Machine::decode(&state.encode().unwrap()).is_err());
        state.sections.pop();
        state.push(DEVICES_SECTION, 1, vec![1, 1, 0]);
        assert_eq!(Machine::decode(&state.encode().unwrap()).unwrap().1, [Description::Rng { features: 0 }]);
        state.push("more", 1, Vec::new());
        assert!(Machine::decode(&state.encode().unwrap()).unwrap_err().to_string().contains("more"));
    }

    #[test]
    fn tsc_rates_may_differ_a_little() {
        assert!(!machine(2_000_000).tsc_must_be_set(2_000_400, false).unwrap());
        assert!(machine(2_000_000).tsc_must_be_set(2_001_000, false).is_err());
        assert!(machine(2_000_000).tsc_must_be_set(2_001_000, true).unwrap());
        assert!(machine(0).tsc_must_be_set(2_001_000, true).is_err());
    }
}
