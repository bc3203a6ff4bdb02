//! Neighbours whose hardware addresses a host tells, so that the guest need not ask: of ARP, and of IPv6.

use bulkhead_protocol::types::ARPNeighbor;
use netlink_packet_route::{
    AddressFamily,
    neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourHeader, NeighbourMessage, NeighbourState},
    route::RouteType,
};

use super::{
    link,
    mac::Mac,
    netlink::{Existing, Netlink, Request},
    prefix,
};
use crate::error::{During, Error, Result};

/// What a host tells, understood.
pub(super) struct Neighbour<'a> {
    device: &'a str,
    address: std::net::IpAddr,
    mac: Option<Mac>,
    state: NeighbourState,
    flags: NeighbourFlags,
}

/// Adds neighbours, or changes what is known of them. All are understood before the first is added.
pub(super) fn add(netlink: &mut Netlink, neighbours: &[ARPNeighbor]) -> Result<()> {
    let neighbours = neighbours.iter().map(Neighbour::of).collect::<Result<Vec<_>>>()?;
    let links = link::list(netlink).during(|| "list the interfaces of the guest".into())?;
    for (done, neighbour) in neighbours.iter().enumerate() {
        let link = link::named(&links, neighbour.device)?;
        let create = Request::create(libc::RTM_NEWNEIGH, Existing::Replace, &neighbour.message(link.index));
        netlink.change(create).during(|| {
            let (address, device, all) = (neighbour.address, neighbour.device, neighbours.len());
            format!("add the neighbour {address} on {device} ({done} of {all} neighbours are there)")
        })?;
    }
    Ok(())
}

impl<'a> Neighbour<'a> {
    pub(super) fn of(neighbour: &'a ARPNeighbor) -> Result<Neighbour<'a>> {
        let what = format!("a neighbour on {:?}", neighbour.device);
        let invalid = |why: String| Error::Invalid(format!("{what}: {why}"));
        let state = match u16::try_from(neighbour.state) {
            Ok(0) => NeighbourState::Permanent,
            Ok(state) => state.into(),
            Err(_) => return Err(invalid(format!("{} is no state", neighbour.state))),
        };
        let mac = if neighbour.lladdr.is_empty() { None } else { Some(neighbour.lladdr.parse()?) };
        Ok(Neighbour {
            device: &neighbour.device,
            address: prefix::address(&what, &neighbour.toIPAddress.address)?,
            mac,
            state,
            // The kernel has eight of them.
            flags: NeighbourFlags::from_bits_retain(neighbour.flags.to_le_bytes()[0]),
        })
    }

    pub(super) fn message(&self, link: u32) -> NeighbourMessage {
        let mut message = NeighbourMessage::default();
        message.header = NeighbourHeader {
            family: if self.address.is_ipv6() { AddressFamily::Inet6 } else { AddressFamily::Inet },
            ifindex: link,
            state: self.state,
            flags: self.flags,
            kind: RouteType::Unicast,
        };
        message.attributes.push(NeighbourAttribute::Destination(self.address.into()));
        message.attributes.extend(self.mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())));
        message
    }
}

/// The permanent neighbours on a link, as text.
#[cfg(test)]
pub(super) fn fixed(netlink: &mut Netlink, link: u32) -> Vec<String> {
    use netlink_packet_route::neighbour::NeighbourAddress;

    let all: Vec<NeighbourMessage> = netlink.dump(libc::RTM_GETNEIGH, &NeighbourMessage::default()).unwrap();
    let own = all.iter().filter(|message| {
        message.header.ifindex == link && message.header.state == NeighbourState::Permanent
    });
    let mut texts: Vec<_> = own
        .map(|message| {
            let (mut address, mut mac) = (String::new(), String::new());
            for attribute in &message.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = ip.to_string(),
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = ip.to_string(),
                    NeighbourAttribute::LinkLayerAddress(bytes) => {
                        mac = Mac(bytes.as_slice().try_into().unwrap()).to_string();
                    }
                    _ => {}
                }
            }
            format!("{address} {mac}")
        })
        .filter(|text| !text.starts_with("ff0") && !text.starts_with("224."))
        .collect();
    texts.sort_unstable();
    texts
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::types::IPAddress;

    use super::*;
    use crate::network::namespace::Namespace;

    fn neighbour(address: &str, mac: &str) -> ARPNeighbor {
        ARPNeighbor {
            toIPAddress: Some(IPAddress { address: address.into(), ..Default::default() }).into(),
            device: "a0".into(),
            lladdr: mac.into(),
            ..Default::default()
        }
    }

    #[test]
    fn neighbours_of_both_families_are_added_and_changed() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("a0", "a1");
            let added =
                [neighbour("10.0.0.1", "02:00:00:00:00:01"), neighbour("fd00::1", "02:00:00:00:00:02")];
            add(&mut namespace.netlink, &added).unwrap();
            let fixed = |namespace: &mut Namespace| fixed(&mut namespace.netlink, first.index);
            assert_eq!(fixed(namespace), ["10.0.0.1 02:00:00:00:00:01", "fd00::1 02:00:00:00:00:02"]);
            let stale = ARPNeighbor { state: 4, ..neighbour("fd00::1", "02:00:00:00:00:02") };
            add(&mut namespace.netlink, &[neighbour("10.0.0.1", "02:00:00:00:00:03"), stale]).unwrap();
            assert_eq!(fixed(namespace), ["10.0.0.1 02:00:00:00:00:03"]);
        });
    }

    #[test]
    fn a_wrong_neighbour_is_refused_by_name_before_any_is_added() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("a0", "a1");
            let good = neighbour("10.0.0.1", "02:00:00:00:00:01");
            let cases = [
                (neighbour("", ""), "\"\""),
                (ARPNeighbor { toIPAddress: None.into(), ..good.clone() }, "\"\""),
                (neighbour("10.0.0", ""), "10.0.0"),
                (neighbour("10.0.0.1", "02:00"), "02:00"),
                (ARPNeighbor { state: -1, ..good.clone() }, "-1"),
                (ARPNeighbor { state: 1 << 20, ..good.clone() }, "1048576"),
            ];
            for (bad, word) in cases {
                let error = add(&mut namespace.netlink, &[good.clone(), bad]).unwrap_err();
                assert!(matches!(&error, Error::Invalid(text) if text.contains(word)), "{error}");
            }
            let nowhere = ARPNeighbor { device: "a9".into(), ..good };
            let error = add(&mut namespace.netlink, &[nowhere]).unwrap_err();
            assert_eq!(error.to_string(), "Link not found (Name: a9)");
            assert!(fixed(&mut namespace.netlink, first.index).is_empty());
        });
    }
}
