//! TLS 1.3 between hosts that pin each other's keys.
//!
//! Both ends show a certificate and sign the handshake with its key. Each end checks two things: that the key's
//! fingerprint is trusted here, and that the signature is by that key. Names and dates in a certificate say
//! nothing. Sessions are never resumed, because a resumed session would not look at the trust store, and a revoked
//! host would still get in.

use crate::error::{Error, Result};
use crate::identity::{Fingerprint, Identity, TrustStore};
use protocol::handshake::ALPN;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, PeerMisbehaved, SignatureScheme};
use std::sync::{Arc, OnceLock};

/// The name in the client's hello. It is not sent (no SNI) and not checked; TLS wants one.
pub(super) const SERVER_NAME: &str = "migrate";

/// Whom one end lets in, and whom it turned away.
#[derive(Debug)]
pub(super) struct Gate {
    provider: Arc<CryptoProvider>,
    allowed: Vec<Fingerprint>,
    refused: OnceLock<Fingerprint>,
}

impl Gate {
    /// Lets in only these keys.
    pub(super) fn new(allowed: Vec<Fingerprint>) -> Arc<Self> {
        Arc::new(Self { provider: provider(), allowed, refused: OnceLock::new() })
    }

    /// Lets in every host that is trusted.
    pub(super) fn of_store(trust: &TrustStore) -> Arc<Self> {
        Self::new(trust.list().iter().map(|host| host.fingerprint).collect())
    }

    /// The key that was shown and is not let in.
    pub(super) fn refused(&self) -> Option<Fingerprint> {
        self.refused.get().copied()
    }

    fn check(&self, certificate: &CertificateDer<'_>) -> std::result::Result<(), rustls::Error> {
        let shown = Fingerprint::of_certificate(certificate)
            .map_err(|_| rustls::Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if self.allowed.contains(&shown) {
            return Ok(());
        }
        let _ = self.refused.set(shown);
        // The peer sees the alert access_denied (49), which nothing else here causes.
        Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }

    fn schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// Both ends are configured for TLS 1.3 alone: QUIC has nothing else.
fn no_tls12() -> rustls::Error {
    rustls::Error::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedPsk)
}

impl ServerCertVerifier for Gate {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

impl ClientCertVerifier for Gate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> std::result::Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, rustls::Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    let mut provider = aws_lc_rs::default_provider();
    // 128-bit AES first: every x86-64 with KVM has AES instructions, and ten rounds are cheaper than fourteen.
    provider.cipher_suites = vec![
        aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
        aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    Arc::new(provider)
}

fn certified(identity: &Identity) -> Result<Arc<SingleCertAndKey>> {
    let key: CertifiedKey = identity.certified_key().map_err(unusable)?;
    Ok(Arc::new(SingleCertAndKey::from(key)))
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::Identity(format!("TLS cannot use this host's key: {error}"))
}

/// The listening end's half.
pub(super) fn server(
    identity: &Identity,
    gate: Arc<Gate>,
) -> Result<Arc<quinn::crypto::rustls::QuicServerConfig>> {
    let mut config = rustls::ServerConfig::builder_with_provider(gate.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .with_client_cert_verifier(gate)
        .with_cert_resolver(certified(identity)?);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config.try_into().map_err(unusable)?))
}

/// The dialling end's half.
pub(super) fn client(
    identity: &Identity,
    gate: Arc<Gate>,
) -> Result<Arc<quinn::crypto::rustls::QuicClientConfig>> {
    let mut config = rustls::ClientConfig::builder_with_provider(gate.provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(gate)
        .with_client_cert_resolver(certified(identity)?);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(Arc::new(config.try_into().map_err(unusable)?))
}

/// The key that the peer of an established connection proved to have.
pub(super) fn peer_key(connection: &quinn::Connection) -> Option<Fingerprint> {
    let certificates = connection.peer_identity()?.downcast::<Vec<CertificateDer<'static>>>().ok()?;
    Fingerprint::of_certificate(certificates.first()?).ok()
}
