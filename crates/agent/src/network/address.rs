//! The addresses of a link.

use std::{io, net::IpAddr};

use netlink_packet_route::{
    AddressFamily,
    address::{
        AddressAttribute, AddressFlags, AddressHeader, AddressHeaderFlags, AddressMessage, AddressScope,
    },
};

use super::{
    netlink::{Existing, Netlink, Request},
    prefix::Prefix,
};
use crate::error::{During, Result};

/// An address as the kernel has it.
#[derive(Clone, Debug)]
pub(super) struct Address {
    /// The number of its link.
    pub(super) link: u32,
    /// The address itself, and its network's length.
    pub(super) prefix: Prefix,
    /// As the kernel told it, which deletes it and makes it again.
    pub(super) message: AddressMessage,
}

/// All addresses of the guest.
pub(super) fn list(netlink: &mut Netlink) -> io::Result<Vec<Address>> {
    let messages: Vec<AddressMessage> = netlink.dump(libc::RTM_GETADDR, &AddressMessage::default())?;
    Ok(messages.into_iter().filter_map(Address::of).collect())
}

/// Gives a link the addresses that are wanted, and takes away what else was given to it. What is not wanted goes first:
/// with the first address of a network the kernel removes the others in it.
pub(super) fn replace(netlink: &mut Netlink, link: u32, name: &str, wanted: &[Prefix]) -> Result<()> {
    let had = list(netlink).during(|| "list the addresses of the guest".into())?;
    for address in had.iter().filter(|address| address.link == link && address.is_obsolete(wanted)) {
        match netlink.change(Request::change(libc::RTM_DELADDR, &address.message)) {
            // It went with another one.
            Err(refusal) if refusal.errno == libc::EADDRNOTAVAIL => {}
            deleted => {
                deleted
                    .during(|| format!("take the address {} from the interface {name}", address.prefix))?;
            }
        }
    }
    for prefix in wanted {
        let create = Request::create(libc::RTM_NEWADDR, Existing::Replace, &message(link, *prefix));
        netlink.change(create).during(|| format!("give the address {prefix} to the interface {name}"))?;
    }
    Ok(())
}

/// A new address. The host knows that nobody else has it, so IPv6 need not find out first, and it can be used at once.
fn message(link: u32, prefix: Prefix) -> AddressMessage {
    let mut message = AddressMessage::default();
    let mut attributes =
        vec![AddressAttribute::Local(prefix.address), AddressAttribute::Address(prefix.address)];
    let (mut family, mut flags) = (AddressFamily::Inet, AddressHeaderFlags::empty());
    if prefix.address.is_ipv6() {
        (family, flags) = (AddressFamily::Inet6, AddressHeaderFlags::Nodad);
        attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
    }
    attributes.extend(prefix.broadcast().map(AddressAttribute::Broadcast));
    message.header = AddressHeader {
        family,
        prefix_len: prefix.length,
        flags,
        scope: AddressScope::Universe,
        index: link,
    };
    message.attributes = attributes;
    message
}

impl Address {
    pub(super) fn of(message: AddressMessage) -> Option<Address> {
        let (mut local, mut address) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                AddressAttribute::Local(is) => local = Some(*is),
                AddressAttribute::Address(is) => address = Some(*is),
                _ => {}
            }
        }
        // Of a point-to-point link the second one is the other end's.
        let prefix = Prefix { address: local.or(address)?, length: message.header.prefix_len };
        Some(Address { link: message.header.index, prefix, message })
    }

    /// The kernel made it, or learned it from a router; it would make it again.
    pub(super) fn is_kernels(&self) -> bool {
        match self.prefix.address {
            IpAddr::V6(address) => {
                address.is_unicast_link_local()
                    || !self.message.header.flags.contains(AddressHeaderFlags::Permanent)
            }
            IpAddr::V4(_) => false,
        }
    }

    fn is_obsolete(&self, wanted: &[Prefix]) -> bool {
        !self.is_kernels() && !wanted.contains(&self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::namespace::Namespace;

    fn prefixes(texts: &[&str]) -> Vec<Prefix> {
        texts.iter().map(|text| Prefix::parse_cidr("", text).unwrap()).collect()
    }

    fn of_link(namespace: &mut Namespace, link: u32) -> Vec<String> {
        let all = list(&mut namespace.netlink).unwrap();
        let mut texts: Vec<_> = all
            .iter()
            .filter(|address| address.link == link && !address.is_kernels())
            .map(|address| address.prefix.to_string())
            .collect();
        texts.sort_unstable();
        texts
    }

    #[test]
    fn what_is_wanted_is_there_and_nothing_else() {
        Namespace::run(|namespace| {
            let [first, second] = namespace.pair_up("a0", "a1");
            let steps: [&[&str]; 6] = [
                &["10.0.0.2/24", "fd00::2/64"],
                &["10.0.0.2/24", "10.0.0.3/24", "10.0.1.1/32", "fd00::2/64", "fd00::3/64"],
                // The first of its network goes, the second stays.
                &["10.0.0.3/24", "fd00::3/64"],
                // The same addresses with other masks.
                &["10.0.0.3/16", "fd00::3/48"],
                &["fd00::3/48"],
                &[],
            ];
            for wanted in steps {
                // The second time nothing is left to be done.
                for _ in 0..2 {
                    replace(&mut namespace.netlink, first.index, "a0", &prefixes(wanted)).unwrap();
                    assert_eq!(of_link(namespace, first.index), wanted);
                }
            }
            assert!(of_link(namespace, second.index).is_empty());
        });
    }

    #[test]
    fn an_ipv6_address_can_be_used_at_once_and_the_kernels_own_stays() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("a0", "a1");
            let kernels = |namespace: &mut Namespace| {
                let all = list(&mut namespace.netlink).unwrap();
                all.iter().filter(|address| address.link == first.index && address.is_kernels()).count()
            };
            replace(&mut namespace.netlink, first.index, "a0", &prefixes(&["fd00::2/64"])).unwrap();
            std::net::UdpSocket::bind("[fd00::2]:0").unwrap();
            assert_eq!(kernels(namespace), 1);
            replace(&mut namespace.netlink, first.index, "a0", &[]).unwrap();
            assert_eq!(kernels(namespace), 1);
        });
    }

    #[test]
    fn a_refused_address_is_named() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("a0", "a1");
            let error =
                replace(&mut namespace.netlink, first.index, "a0", &prefixes(&["ff02::1/64"])).unwrap_err();
            assert!(
                error.to_string().starts_with("give the address ff02::1/64 to the interface a0: "),
                "{error}"
            );
        });
    }
}
