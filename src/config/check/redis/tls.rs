//! `redis.tls`: the trusted root certificates, and Statera's own certificate.
//!
//! The files are read and parsed once, here, so that `statera check` finds a wrong one. A renewed
//! certificate needs a restart.

use std::sync::Arc;

use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::super::secret_file;
use crate::config::decode::{Field, Keys, Section};
use crate::config::{RedisAddress, Tls};

const TLS: Keys = Keys {
    now: &["ca_file", "cert_file", "key_file"],
    later: &[],
    example: "{ca_file: /etc/statera/redis-ca.pem}",
    meant: &[],
};

type Identity = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

/// Reads `redis.tls`. `None` where TLS is not used, and where a problem was reported.
pub(super) fn tls(redis: &Section<'_>, address: &RedisAddress) -> Option<Tls> {
    let has_nodes = matches!(address, RedisAddress::Sentinel(_) | RedisAddress::Cluster(_));
    if has_nodes && !redis.has("tls") {
        return None;
    }
    let section = redis.section("tls", TLS);
    if !has_nodes && !matches!(address, RedisAddress::Tls { .. }) {
        if let Some(field) = redis.field("tls") {
            field.refuse_unshown("it has no effect on this url: write rediss://, or remove it");
        }
        return None;
    }
    let ca_file = section.field("ca_file");
    let roots = match &ca_file {
        Some(field) => roots_of(field),
        None => system_roots(redis.field("url").as_ref().unwrap_or(section.whole())),
    };
    let identity = identity(&section);
    // The process's default provider is not set: other code in the process may choose its own.
    let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()));
    let builder = builder.with_safe_default_protocol_versions().ok()?.with_root_certificates(roots?);
    let config = match identity? {
        None => builder.with_no_client_auth(),
        Some((key_file, (chain, key))) => builder
            .with_client_auth_cert(chain, key)
            .inspect_err(|error| key_file.refuse(format_args!("it does not fit cert_file: {error}")))
            .ok()?,
    };
    Some(Tls(Arc::new(config)))
}

fn roots_of(field: &Field<'_>) -> Option<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(field)? {
        if let Err(error) = roots.add(certificate) {
            field.refuse(format_args!("it has a certificate that cannot be a root of trust: {error}"));
            return None;
        }
    }
    Some(roots)
}

fn system_roots(field: &Field<'_>) -> Option<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() {
        field.refuse(
            "this machine has no root certificates: set redis.tls.ca_file, or install ca-certificates",
        );
        return None;
    }
    Some(roots)
}

/// The certificate and key that Statera sends. `Some(None)`: there is none. `None`: a problem was reported.
fn identity<'a>(section: &Section<'a>) -> Option<Option<(Field<'a>, Identity)>> {
    let (cert_file, key_file) = match (section.field("cert_file"), section.field("key_file")) {
        (Some(cert_file), Some(key_file)) => (cert_file, key_file),
        (None, None) => return (!section.has("cert_file") && !section.has("key_file")).then_some(None),
        (Some(alone), None) => {
            alone.refuse("key_file is missing: a certificate needs its key");
            return None;
        }
        (None, Some(alone)) => {
            alone.refuse("cert_file is missing: a key needs its certificate");
            return None;
        }
    };
    let chain = certificates(&cert_file);
    let key = key(&key_file);
    Some(Some((key_file, (chain?, key?))))
}

fn certificates(field: &Field<'_>) -> Option<Vec<CertificateDer<'static>>> {
    let pem = secret_file::read_pem(field)?;
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    match certificates {
        Ok(certificates) if !certificates.is_empty() => Some(certificates),
        Ok(_) => {
            field.refuse("it has no certificate: PEM is needed, with a line BEGIN CERTIFICATE");
            None
        }
        Err(error) => {
            field.refuse(format_args!("it is not PEM: {error}"));
            None
        }
    }
}

fn key(field: &Field<'_>) -> Option<PrivateKeyDer<'static>> {
    let pem = secret_file::read_pem(field)?;
    // The parser's message is not shown, since it may quote the key.
    PrivateKeyDer::from_pem_slice(&pem)
        .inspect_err(|_| {
            field.refuse("it has no private key that can be read: PEM without a passphrase is needed");
        })
        .ok()
}
