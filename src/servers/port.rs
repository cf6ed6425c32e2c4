//! Free TCP ports on loopback.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
};

/// A port that nobody listens on at this moment, on `ip`: `wanted`, or the next one above it that is free.
///
/// Another process may take it before it is used; whoever starts a server there sees it fail.
///
/// # Errors
/// When there is none up to 65535, or sockets can't be opened at all.
pub fn free_port_from(ip: IpAddr, wanted: u16) -> io::Result<u16> {
    if wanted == 0 {
        return free_port_on(ip);
    }
    for port in wanted..=u16::MAX {
        match TcpListener::bind(SocketAddr::new(ip, port)) {
            Ok(_listener) => return Ok(port),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::AddrInUse,
        format!("all ports from {wanted} to 65535 are in use"),
    ))
}

/// Any port of loopback that is free at this moment.
///
/// # Errors
/// When sockets can't be opened.
pub fn free_port() -> io::Result<u16> {
    free_port_on(Ipv4Addr::LOCALHOST.into())
}

/// `N` different ports of loopback that are free at this moment.
///
/// # Errors
/// When sockets can't be opened.
pub(super) fn free_ports<const N: usize>() -> io::Result<[u16; N]> {
    let mut ports = [0; N];
    // Held until all are known: a port that was let go may be given again.
    let mut held = Vec::with_capacity(N);
    for port in &mut ports {
        let listener = TcpListener::bind(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 0))?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}

fn free_port_on(ip: IpAddr) -> io::Result<u16> {
    Ok(TcpListener::bind(SocketAddr::new(ip, 0))?
        .local_addr()?
        .port())
}
