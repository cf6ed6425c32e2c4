//! Which addresses requests may go to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::config::Network;

/// Whether requests may go to `address`: it is a public one, or the operator allows it.
pub(super) fn is_allowed(address: IpAddr, allow: &[Network]) -> bool {
    is_public(address) || allow.iter().any(|network| network.contains(address))
}

/// Whether an address belongs to the public internet: neither private, loopback, link-local nor otherwise special
/// (the registries of RFC 6890), and no IPv6 address that another IPv4 address is hidden in.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(a == 0
        || a == 10
        || a == 100 && (64..128).contains(&b)
        || a == 127
        || a == 169 && b == 254
        || a == 172 && (16..32).contains(&b)
        || (a, b, c) == (192, 0, 0)
        || (a, b, c) == (192, 0, 2)
        || (a, b, c) == (192, 88, 99)
        || (a, b) == (192, 168)
        || a == 198 && (18..20).contains(&b)
        || (a, b, c) == (198, 51, 100)
        || (a, b, c) == (203, 0, 113)
        || a >= 224)
}

fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    // Outside of 2000::/3 are loopback, unique-local, link-local, multicast, and the translation of IPv4 (64:ff9b::).
    a & 0xe000 == 0x2000
        // Special purposes, among them Teredo.
        && !(a == 0x2001 && b < 0x0200)
        // Documentation.
        && !(a == 0x2001 && b == 0x0db8)
        && !(a == 0x3fff && b < 0x1000)
        // 6to4.
        && a != 0x2002
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_reached_unless_allowed() {
        for private in [
            "0.0.0.0",
            "10.1.2.3",
            "100.64.0.1",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.0.1",
            "198.18.0.1",
            "198.51.100.1",
            "203.0.113.9",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "64:ff9b::7f00:1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "3fff::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            let address: IpAddr = private.parse().unwrap();
            assert!(!is_allowed(address, &[]), "{private}");
            let all = ["0.0.0.0/0", "::/0"].map(|all| Network::try_from(all.to_owned()).unwrap());
            assert!(is_allowed(address, &all), "{private}");
        }
        for public in [
            "1.1.1.1",
            "100.63.0.1",
            "100.128.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "223.255.255.255",
            "::ffff:8.8.8.8",
            "2001:4860:4860::8888",
            "2606:4700::1111",
        ] {
            assert!(is_allowed(public.parse().unwrap(), &[]), "{public}");
        }
        let other = [Network::try_from("10.0.0.0/8".to_owned()).unwrap()];
        assert!(!is_allowed("192.168.0.1".parse().unwrap(), &other));
    }
}
