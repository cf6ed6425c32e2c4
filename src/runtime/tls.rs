//! TLS of connections that this process opens.

use std::{io, sync::Arc};

use tokio_rustls::{
    TlsConnector,
    rustls::{self, ClientConfig, RootCertStore},
};

/// TLS of a client, with the system's certificate authorities (or those of `SSL_CERT_FILE`). In the handshake it offers
/// `protocols` (ALPN), the preferred one first; none of them: no such offer.
///
/// # Errors
/// There are no authorities, or they can't be read.
pub fn tls(protocols: &[&[u8]]) -> io::Result<TlsConnector> {
    let found = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(found.certs);
    if let (true, Some(error)) = (roots.is_empty(), found.errors.into_iter().next()) {
        return Err(io::Error::other(error));
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Ok(TlsConnector::from(Arc::new(config)))
}
