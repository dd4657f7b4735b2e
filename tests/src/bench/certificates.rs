//! Certificates for the peer's TLS: a CA, a server and a client, made for one run of the benchmark.

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, ExtendedKeyUsagePurpose,
    IsCa, KeyPair, KeyUsagePurpose,
};
use std::path::Path;

/// The name that the server's certificate is for.
pub(super) const SERVER: &str = "bench.invalid";

/// Writes `ca-cert.pem` and key and certificate of both ends into a directory, under the names that QEMU looks for
/// (QEMU, "TLS setup for network services").
pub(super) fn write(dir: &Path) -> Result<(), Box<dyn std::error::Error>> {
    let named = |name: &str| {
        let mut params = CertificateParams::new(vec![SERVER.to_owned()])?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        Ok::<_, rcgen::Error>(params)
    };
    let mut ca = named("bench CA")?;
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate()?)?;
    std::fs::write(dir.join("ca-cert.pem"), ca.pem())?;
    let ends =
        [("server", ExtendedKeyUsagePurpose::ServerAuth), ("client", ExtendedKeyUsagePurpose::ClientAuth)];
    for (end, purpose) in ends {
        let mut params = named(if end == "server" { SERVER } else { end })?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        params.extended_key_usages = vec![purpose];
        let key = KeyPair::generate()?;
        let certificate = params.signed_by(&key, &ca)?;
        std::fs::write(dir.join(format!("{end}-cert.pem")), certificate.pem())?;
        std::fs::write(dir.join(format!("{end}-key.pem")), key.serialize_pem())?;
    }
    Ok(())
}
