//! The links of the guest: what the kernel tells about each, and the changes that it can be asked for.
//!
//! Only the attributes that are needed are read and written: the library's own link message knows those of every kind of
//! link there is, which is four times the code of all the rest of the network, and one that it misreads would lose the list.

use std::io;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NlaBuffer, NlasIterator, Parseable, parse_string, parse_u32,
};
use netlink_packet_route::link::{LinkFlags, LinkHeader, Stats64};

use super::{
    mac::Mac,
    netlink::{Netlink, Request},
};
use crate::error::{Error, Result};

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_INFO_KIND: u16 = 1;

/// A header's bytes.
const HEADER: usize = 16;

/// A link as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Link {
    /// Its number, which stays the same when its name changes.
    pub(super) index: u32,
    /// Its name.
    pub(super) name: String,
    /// Its hardware address, where it has one of Ethernet's.
    pub(super) mac: Option<Mac>,
    /// The largest packet it takes, in bytes.
    pub(super) mtu: u32,
    /// `IFF_*`.
    pub(super) flags: LinkFlags,
    /// What made it: `veth`, `vlan`; nothing for a device.
    pub(super) kind: String,
    /// What went through it.
    pub(super) figures: Stats64,
}

/// All links of the guest.
pub(super) fn list(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    netlink.dump(libc::RTM_GETLINK, &LinkHeader::default())
}

/// The link of a name. Hosts wait for one by the words "Link not found".
pub(super) fn named<'a>(links: &'a [Link], name: &str) -> Result<&'a Link> {
    links
        .iter()
        .find(|link| link.name == name)
        .ok_or_else(|| Error::State(format!("Link not found (Name: {name})")))
}

/// What the kernel takes for a name, without those that it would replace by one of its own choice (`eth%d`).
pub(super) fn check_name(name: &str) -> Result<()> {
    let plain = |byte: u8| !byte.is_ascii_whitespace() && !byte.is_ascii_control() && !b"/:%".contains(&byte);
    if (1..=15).contains(&name.len()) && name.bytes().all(plain) && name != "." && name != ".." {
        return Ok(());
    }
    Err(Error::Invalid(format!(
        "{name:?} is not a name for an interface: 1 to 15 bytes without '/', ':', '%'"
    )))
}

impl Link {
    /// Packets can go through it.
    pub(super) fn is_up(&self) -> bool {
        self.flags.contains(LinkFlags::Up)
    }

    /// It is the guest's own.
    pub(super) fn is_loopback(&self) -> bool {
        self.flags.contains(LinkFlags::Loopback)
    }
}

impl Parseable<[u8]> for Link {
    fn parse(body: &[u8]) -> std::result::Result<Link, DecodeError> {
        let header = LinkHeader::parse(body)?;
        let mut link = Link { index: header.index, flags: header.flags, ..Link::default() };
        for attribute in attributes(body.get(HEADER..)) {
            let value = attribute.value();
            match attribute.kind() {
                IFLA_IFNAME => link.name = parse_string(value)?,
                IFLA_MTU => link.mtu = parse_u32(value)?,
                IFLA_ADDRESS => link.mac = value.try_into().ok().map(Mac),
                IFLA_STATS64 => link.figures = Stats64::parse(value)?,
                IFLA_LINKINFO => {
                    let kind = attributes(Some(value)).find(|inner| inner.kind() == IFLA_INFO_KIND);
                    link.kind = kind.map(|kind| parse_string(kind.value())).transpose()?.unwrap_or_default();
                }
                _ => {}
            }
        }
        Ok(link)
    }
}

fn attributes(bytes: Option<&[u8]>) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(bytes.unwrap_or_default()).filter_map(std::result::Result::ok)
}

/// A change of one link, in one message: the kernel takes the hardware address first, then the MTU, the name, the flags.
pub(super) struct Change {
    header: LinkHeader,
    attributes: Vec<DefaultNla>,
}

impl Change {
    /// Of the link of this number.
    pub(super) fn of(index: u32) -> Change {
        Change { header: LinkHeader { index, ..LinkHeader::default() }, attributes: Vec::new() }
    }

    /// Sets the flags of `mask` to those of `flags`.
    pub(super) fn flags(mut self, flags: LinkFlags, mask: LinkFlags) -> Change {
        (self.header.flags, self.header.change_mask) = (flags, mask);
        self
    }

    /// Sets it up.
    pub(super) fn up(self) -> Change {
        self.flags(LinkFlags::Up, LinkFlags::Up)
    }

    /// Sets it down, which forgets its routes, its neighbours and its IPv6 addresses.
    pub(super) fn down(self) -> Change {
        self.flags(LinkFlags::empty(), LinkFlags::Up)
    }

    /// Sets the name, of a link that is down.
    pub(super) fn name(self, name: &str) -> Change {
        self.attribute(IFLA_IFNAME, [name.as_bytes(), b"\0"].concat())
    }

    /// Sets the hardware address.
    pub(super) fn mac(self, mac: Mac) -> Change {
        self.attribute(IFLA_ADDRESS, mac.0.to_vec())
    }

    /// Sets the MTU.
    pub(super) fn mtu(self, mtu: u32) -> Change {
        self.attribute(IFLA_MTU, mtu.to_ne_bytes().to_vec())
    }

    /// The request for it.
    pub(super) fn request(&self) -> Request {
        Request::change(libc::RTM_SETLINK, self)
    }

    fn attribute(mut self, kind: u16, value: Vec<u8>) -> Change {
        self.attributes.push(DefaultNla::new(kind, value));
        self
    }
}

impl Emitable for Change {
    fn buffer_len(&self) -> usize {
        self.header.buffer_len() + self.attributes.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        let (header, attributes) = buffer.split_at_mut(self.header.buffer_len());
        self.header.emit(header);
        self.attributes.as_slice().emit(attributes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::namespace::Namespace;

    #[test]
    fn names_are_what_the_kernel_takes() {
        for name in ["eth0", "a", "fifteen-bytes-x", "..."] {
            check_name(name).unwrap();
        }
        for name in ["", ".", "..", "sixteen-bytes-xy", "a/b", "a b", "eth%d", "a:b", "a\0", "a\n"] {
            assert!(matches!(check_name(name), Err(Error::Invalid(_))), "{name:?}");
        }
    }

    #[test]
    fn a_missing_link_answers_with_the_words_that_hosts_wait_for() {
        assert_eq!(named(&[], "eth7").unwrap_err().to_string(), "Link not found (Name: eth7)");
    }

    #[test]
    fn what_is_changed_is_what_is_listed() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair("a0", "a1");
            let mac = Mac([2, 0, 0, 0, 0, 9]);
            let change = Change::of(first.index).name("b0").mac(mac).mtu(1400).up();
            namespace.netlink.change(change.request()).unwrap();
            let links = list(&mut namespace.netlink).unwrap();
            let link = named(&links, "b0").unwrap();
            assert_eq!((link.index, link.mac, link.mtu), (first.index, Some(mac), 1400));
            assert!(link.is_up() && !link.is_loopback());
            assert_eq!(link.kind, "veth");
            let lo = named(&links, "lo").unwrap();
            assert!(lo.is_loopback() && lo.kind.is_empty() && lo.mac == Some(Mac([0; 6])));
        });
    }

    #[test]
    fn the_kernel_says_why_it_refuses() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair("a0", "a1");
            let refusal = namespace.netlink.change(Change::of(first.index).mtu(1).request()).unwrap_err();
            assert_eq!(refusal.errno, libc::EINVAL);
            assert!(refusal.to_string().contains("mtu less than device minimum"), "{refusal}");
            let refusal = namespace.netlink.change(Change::of(999).up().request()).unwrap_err();
            assert_eq!(refusal.errno, libc::ENODEV);
        });
    }
}
