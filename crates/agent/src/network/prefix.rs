//! Addresses with the length of their prefix, of IPv4 and IPv6.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use crate::error::{Error, Result};

/// An address and how many of its first bits are its network's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    /// The address, of a host or a network.
    pub(super) address: IpAddr,
    /// At most 32, or 128.
    pub(super) length: u8,
}

/// An address on its own; `what` says whose it is.
pub(super) fn address(what: &str, text: &str) -> Result<IpAddr> {
    text.parse().map_err(|_| Error::Invalid(format!("{what}: {text:?} is not an IP address")))
}

impl Prefix {
    /// From an address and a length in decimal digits; `what` says whose they are.
    pub(super) fn parse(what: &str, text: &str, length: &str) -> Result<Prefix> {
        let address = address(what, text)?;
        let longest = bits(address);
        match length.parse() {
            Ok(number) if number <= longest && length.bytes().all(|digit| digit.is_ascii_digit()) => {
                Ok(Prefix { address, length: number })
            }
            _ => Err(Error::Invalid(format!(
                "{what}: the mask {length:?} of {text} is not a prefix length from 0 to {longest}"
            ))),
        }
    }

    /// From `<address>/<length>`, or an address alone, which is all prefix.
    pub(super) fn parse_cidr(what: &str, text: &str) -> Result<Prefix> {
        match text.split_once('/') {
            Some((address, length)) => Prefix::parse(what, address, length),
            None => address(what, text).map(Prefix::host),
        }
    }

    /// The prefix that is one address.
    pub(super) fn host(address: IpAddr) -> Prefix {
        Prefix { address, length: bits(address) }
    }

    /// The prefix that is all addresses of a family.
    pub(super) fn all(v6: bool) -> Prefix {
        Prefix { address: unspecified(v6), length: 0 }
    }

    /// The network that the address is in.
    pub(super) fn network(self) -> Prefix {
        let hosts = u32::from(bits(self.address) - self.length);
        let address = match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(hosts).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & mask))
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(hosts).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
            }
        };
        Prefix { address, ..self }
    }

    /// Whether it is one address and no more.
    pub(super) fn is_host(self) -> bool {
        self.length == bits(self.address)
    }

    /// The last address of an IPv4 network, where a network has one to spare.
    pub(super) fn broadcast(self) -> Option<Ipv4Addr> {
        match self.address {
            IpAddr::V4(address) if self.length <= 30 => {
                Some(Ipv4Addr::from_bits(address.to_bits() | u32::MAX.checked_shr(self.length.into())?))
            }
            _ => None,
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

/// The address that means none.
pub(super) fn unspecified(v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv6() { 128 } else { 32 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_prefix_is_refused_by_name() {
        let cases = [
            ("10.0.0.1", "33"),
            ("10.0.0.1", "+8"),
            ("10.0.0.1", ""),
            ("10.0.0.1", "255.255.255.0"),
            ("10.0.0.1", "-1"),
            ("fd00::1", "129"),
            ("10.0.0", "8"),
            ("", "8"),
            ("10.0.0.1\0", "8"),
        ];
        for (address, length) in cases {
            let error = Prefix::parse("the address", address, length).unwrap_err();
            assert!(matches!(&error, Error::Invalid(_)), "{error}");
        }
        let error = Prefix::parse_cidr("the route", "10.0.0.0/40").unwrap_err().to_string();
        assert!(
            error.contains("the route") && error.contains("\"40\"") && error.contains("10.0.0.0"),
            "{error}"
        );
    }

    #[test]
    fn networks_and_broadcasts() {
        let prefix = |text| Prefix::parse_cidr("", text).unwrap();
        let cases = [
            ("10.1.2.3/8", "10.0.0.0/8", Some([10, 255, 255, 255])),
            ("10.1.2.3/30", "10.1.2.0/30", Some([10, 1, 2, 3])),
            ("10.1.2.3/31", "10.1.2.2/31", None),
            ("10.1.2.3", "10.1.2.3/32", None),
            ("10.1.2.3/0", "0.0.0.0/0", Some([255; 4])),
            ("fd00::1:2/112", "fd00::1:0/112", None),
            ("fd00::1/0", "::/0", None),
            ("fd00::1", "fd00::1/128", None),
        ];
        for (text, network, broadcast) in cases {
            assert_eq!(prefix(text).network().to_string(), network);
            assert_eq!(prefix(text).broadcast(), broadcast.map(Ipv4Addr::from), "{text}");
        }
        assert!(prefix("10.1.2.3").is_host() && !prefix("10.1.2.3/31").is_host());
    }
}
