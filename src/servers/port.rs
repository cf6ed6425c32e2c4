//! Free TCP ports on loopback.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener},
};

/// A port on `ip` that is free at this moment: `wanted`, or the next free one above it.
///
/// Another process may take it before it is used. A server that is started there then fails.
///
/// # Errors
/// If none is free up to 65535, or sockets can't be opened at all.
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
/// If sockets can't be opened.
pub fn free_port() -> io::Result<u16> {
    free_port_on(Ipv4Addr::LOCALHOST.into())
}

/// `N` different ports of loopback that are free at this moment.
///
/// # Errors
/// If sockets can't be opened.
pub(super) fn free_ports<const N: usize>() -> io::Result<[u16; N]> {
    let mut ports = [0; N];
    // Kept open until all are known: a released port may be given again.
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
