//! An interface as a host wants it: a link of the guest with a name, addresses, an MTU.

use std::{collections::BTreeSet, fs, path::Path};

use bulkhead_protocol::types::{IPAddress, IPFamily, Interface};
use netlink_packet_route::link::LinkFlags;

use super::{
    address::{self, Address},
    kept::Kept,
    link::{self, Change, Link},
    mac::Mac,
    netlink::{Netlink, Refusal},
    prefix::Prefix,
};
use crate::error::{During, Error, Result};

/// What a host asks for, understood.
#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    /// The link's name; empty to leave it.
    name: String,
    mac: Option<Mac>,
    mtu: Option<u32>,
    /// No address resolution on it.
    silent: bool,
    addresses: Vec<Prefix>,
}

impl Wanted {
    /// Understands a request, or says what is wrong with it.
    pub(super) fn of(interface: &Interface) -> Result<Wanted> {
        let name = interface.name.clone();
        if name == "lo" {
            return Err(Error::Invalid("the interface lo is the guest's own".into()));
        }
        if name.is_empty() && interface.hwAddr.is_empty() && interface.devicePath.is_empty() {
            return Err(Error::Invalid("the interface has no MAC address, name or device path".into()));
        }
        if !name.is_empty() {
            link::check_name(&name)?;
        }
        let mac = if interface.hwAddr.is_empty() { None } else { Some(interface.hwAddr.parse()?) };
        // The kernel has it as a signed number.
        let mtu = i32::try_from(interface.mtu)
            .map_err(|_| {
                Error::Invalid(format!("{} bytes are no MTU for the interface {name}", interface.mtu))
            })?
            .cast_unsigned();
        let addresses = interface
            .IPAddresses
            .iter()
            .map(|ip| Prefix::parse(&format!("an address of the interface {name}"), &ip.address, &ip.mask))
            .collect::<Result<_>>()?;
        let silent = LinkFlags::from_bits_retain(interface.raw_flags).contains(LinkFlags::Noarp);
        Ok(Wanted { name, mac, mtu: (mtu != 0).then_some(mtu), silent, addresses })
    }

    /// The link that is meant: the one that was plugged, else the one of the hardware address, else that of the name,
    /// which is given the address.
    fn find<'a>(&self, links: &'a [Link], plugged: Option<u32>) -> Result<&'a Link> {
        let links = || links.iter().filter(|link| !link.is_loopback());
        let found = match plugged {
            Some(index) => links().find(|link| link.index == index),
            None => {
                let ours = || links().filter(|link| self.mac.is_some() && link.mac == self.mac);
                // Links made on top of another often have its address.
                ours()
                    .find(|link| link.name == self.name)
                    .or_else(|| ours().next())
                    .or_else(|| links().find(|link| link.name == self.name))
            }
        };
        found.ok_or_else(|| {
            let mac = self.mac.map(|mac| format!(", nor one of the MAC address {mac}")).unwrap_or_default();
            Error::State(format!("Link not found (Name: {}){mac}", self.name))
        })
    }
}

/// Makes an interface what is wanted, and says which link it is.
pub(super) fn update(netlink: &mut Netlink, wanted: &Wanted, plugged: Option<u32>) -> Result<u32> {
    let links = link::list(netlink).during(|| "list the interfaces of the guest".into())?;
    let plan = Plan::of(wanted.find(&links, plugged)?, &links, wanted);
    let kept = Kept::of_links(netlink, &plan.set_down())
        .during(|| format!("list what the interface {} has", plan.link.name))?;
    let changed = plan.apply(netlink);
    kept.restore(netlink);
    changed?;
    let mut addresses = wanted.addresses.clone();
    if addresses.iter().any(|prefix| prefix.address.is_ipv6()) && !has_ipv6() {
        tracing::warn!(
            interface = wanted.name,
            "the guest has no IPv6, and the interface none of its addresses"
        );
        addresses.retain(|prefix| prefix.address.is_ipv4());
    }
    address::replace(netlink, plan.link.index, plan.name.unwrap_or(&plan.link.name), &addresses)?;
    Ok(plan.link.index)
}

/// How a link becomes what is wanted; `None` where it is that already.
struct Plan<'a> {
    link: &'a Link,
    /// Who has the wanted name.
    displaced: Option<&'a Link>,
    name: Option<&'a str>,
    mac: Option<Mac>,
    mtu: Option<u32>,
    silent: bool,
}

impl<'a> Plan<'a> {
    fn of(link: &'a Link, links: &'a [Link], wanted: &'a Wanted) -> Plan<'a> {
        let name = Some(wanted.name.as_str()).filter(|name| !name.is_empty() && *name != link.name);
        Plan {
            link,
            displaced: name.and_then(|name| links.iter().find(|other| other.name == name)),
            name,
            mac: wanted.mac.filter(|_| wanted.mac != link.mac),
            mtu: wanted.mtu.filter(|mtu| *mtu != link.mtu),
            silent: wanted.silent,
        }
    }

    /// Links that are up and have to go down for it.
    fn set_down(&self) -> BTreeSet<u32> {
        let own = (self.name.is_some() || self.mac.is_some()).then_some(self.link);
        own.into_iter().chain(self.displaced).filter(|link| link.is_up()).map(|link| link.index).collect()
    }

    /// Whatever fails, links that were up are up in the end.
    fn apply(&self, netlink: &mut Netlink) -> Result<()> {
        let changed = self.reshape(netlink).and_then(|()| self.rename(netlink));
        let mut up = Vec::new();
        if changed.is_ok() {
            let noarp = if self.silent { LinkFlags::Noarp } else { LinkFlags::empty() };
            up.push(
                Change::of(self.link.index).flags(LinkFlags::Up | noarp, LinkFlags::Up | LinkFlags::Noarp),
            );
        } else if self.link.is_up() {
            up.push(Change::of(self.link.index).up());
        }
        up.extend(self.displaced.filter(|other| other.is_up()).map(|other| Change::of(other.index).up()));
        let risen = all(netlink, &up).during(|| format!("set the interface {} up", self.link.name));
        changed.and(risen)
    }

    /// Sets links down where needed, then what does not depend on names.
    fn reshape(&self, netlink: &mut Netlink) -> Result<()> {
        let mut changes: Vec<_> = self.set_down().into_iter().map(|index| Change::of(index).down()).collect();
        let mut text = format!("change the interface {}", self.link.name);
        if let Some(mac) = self.mac {
            changes.push(Change::of(self.link.index).mac(mac));
            text += &format!(" to the MAC address {mac}");
        }
        if let Some(mtu) = self.mtu {
            changes.push(Change::of(self.link.index).mtu(mtu));
            text += &format!(" to an MTU of {mtu}");
        }
        all(netlink, &changes).during(|| text)
    }

    /// Gives the link its name; who had it takes the old one. The kernel swaps no names, so one has a third name for a
    /// while, but all three steps are one system call: no end of this process leaves that name behind.
    fn rename(&self, netlink: &mut Netlink) -> Result<()> {
        let Some(name) = self.name else { return Ok(()) };
        let own = Change::of(self.link.index).name(name);
        let what = || format!("rename the interface {} to {name}", self.link.name);
        let Some(other) = self.displaced else { return all(netlink, &[own]).during(what) };
        let passing = format!("passing{}", other.index);
        let changes =
            [Change::of(other.index).name(&passing), own, Change::of(other.index).name(&self.link.name)];
        let renamed = all(netlink, &changes);
        if renamed.is_err() {
            // Which of the two names is free depends on the step that failed; where it has one already, both are refused.
            let passed = link::list(netlink).is_ok_and(|links| links.iter().any(|link| link.name == passing));
            if passed {
                let _ = all(
                    netlink,
                    &[
                        Change::of(other.index).name(&other.name),
                        Change::of(other.index).name(&self.link.name),
                    ],
                );
            }
        }
        renamed.during(what)
    }
}

/// Makes changes in one system call; the first that was refused is the error.
fn all(netlink: &mut Netlink, changes: &[Change]) -> std::result::Result<(), Refusal> {
    if changes.is_empty() {
        return Ok(());
    }
    let requests: Vec<_> = changes.iter().map(Change::request).collect();
    netlink.changes(&requests)?.into_iter().collect()
}

/// Whether the kernel has IPv6, and not switched off for all links.
fn has_ipv6() -> bool {
    ["all", "default"].iter().any(|which| {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        fs::read_to_string(path).is_ok_and(|value| value.trim() == "0")
    })
}

/// All interfaces of the guest.
pub(super) fn list(netlink: &mut Netlink) -> Result<Vec<Interface>> {
    let what = || "list the interfaces of the guest".to_owned();
    let addresses = address::list(netlink).during(what)?;
    let links = link::list(netlink).during(what)?;
    Ok(links.into_iter().map(|link| to_wire(link, &addresses)).collect())
}

fn to_wire(link: Link, addresses: &[Address]) -> Interface {
    let device = Path::new("/sys/class/net").join(&link.name);
    let own = addresses.iter().filter(|address| address.link == link.index);
    Interface {
        devicePath: device.canonicalize().map(|path| pci_path(&path)).unwrap_or_default(),
        device: link.name.clone(),
        name: link.name,
        IPAddresses: own.map(|address| address_to_wire(address.prefix)).collect(),
        mtu: link.mtu.into(),
        hwAddr: link.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        type_: if link.kind.is_empty() { "device".into() } else { link.kind },
        raw_flags: link.flags.bits(),
        ..Default::default()
    }
}

fn address_to_wire(prefix: Prefix) -> IPAddress {
    IPAddress {
        family: family(prefix.address.is_ipv6()).into(),
        address: prefix.address.to_string(),
        mask: prefix.length.to_string(),
        ..Default::default()
    }
}

/// The wire's name of a family.
pub(super) fn family(v6: bool) -> IPFamily {
    if v6 { IPFamily::v6 } else { IPFamily::v4 }
}

/// The way to a device on its PCI buses, in the words of requests: `02/1f`. Nothing for a device of another bus.
fn pci_path(device: &Path) -> String {
    let slots = device.components().filter_map(|component| {
        let (bus, function) = component.as_os_str().to_str()?.rsplit_once('.')?;
        let [domain, bus, slot] = bus.split(':').collect::<Vec<_>>().try_into().ok()?;
        if (domain.len(), bus.len(), slot.len(), function.len()) != (4, 2, 2, 1) {
            return None;
        }
        Some(if function == "0" { slot.to_owned() } else { format!("{slot}.{function}") })
    });
    slots.collect::<Vec<_>>().join("/")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{
        Network,
        namespace::Namespace,
        neighbour,
        netlink::{Existing, Request},
        route,
    };

    fn interface(name: &str, mac: Option<Mac>, addresses: &[(&str, &str)]) -> Interface {
        let address = |(address, mask): &(&str, &str)| IPAddress {
            address: (*address).into(),
            mask: (*mask).into(),
            ..Default::default()
        };
        Interface {
            name: name.into(),
            hwAddr: mac.map(|mac| mac.to_string()).unwrap_or_default(),
            IPAddresses: addresses.iter().map(address).collect(),
            ..Default::default()
        }
    }

    fn update_to(namespace: &mut Namespace, interface: &Interface) -> Result<u32> {
        update(&mut namespace.netlink, &Wanted::of(interface)?, None)
    }

    #[test]
    fn a_wrong_request_is_refused_before_anything_is_done() {
        let good = || interface("eth0", Some(Mac([2, 0, 0, 0, 0, 1])), &[]);
        let cases: [(Interface, &str); 11] = [
            (Interface::default(), "no MAC address"),
            (Interface { name: "lo".into(), ..good() }, "lo"),
            (Interface { name: "a/b".into(), ..good() }, "a/b"),
            (Interface { name: "x".repeat(4 << 20), ..good() }, "not a name"),
            (Interface { hwAddr: "02:00".into(), ..good() }, "02:00"),
            (Interface { hwAddr: "02:00:00:00:00:zz".into(), ..good() }, "zz"),
            (Interface { mtu: u64::MAX, ..good() }, "18446744073709551615"),
            (interface("eth0", None, &[("10.0.0", "8")]), "10.0.0"),
            (interface("eth0", None, &[("10.0.0.1", "")]), "mask"),
            (interface("eth0", None, &[("10.0.0.1", "33")]), "33"),
            (interface("eth0", None, &[("fd00::1", "129")]), "129"),
        ];
        for (interface, word) in cases {
            let error = Wanted::of(&interface).unwrap_err();
            assert!(matches!(&error, Error::Invalid(text) if text.contains(word)), "{error}");
        }
        assert_eq!(Wanted::of(&good()).unwrap().mtu, None);
    }

    #[test]
    fn a_link_is_found_by_its_address_and_set_up_as_wanted() {
        Namespace::run(|namespace| {
            let [first, peer] = namespace.pair("a0", "a1");
            let mut wanted = interface("eth0", first.mac, &[("10.0.0.2", "24"), ("fd00::2", "64")]);
            (wanted.mtu, wanted.raw_flags) = (1400, LinkFlags::Noarp.bits());
            assert_eq!(update_to(namespace, &wanted).unwrap(), first.index);
            let link = namespace.link("eth0");
            assert_eq!((link.index, link.mac, link.mtu), (first.index, first.mac, 1400));
            assert!(link.is_up() && link.flags.contains(LinkFlags::Noarp));

            let listed = list(&mut namespace.netlink).unwrap();
            let listed = listed.iter().find(|interface| interface.name == "eth0").unwrap();
            assert_eq!((listed.device.as_str(), listed.type_.as_str(), listed.mtu), ("eth0", "veth", 1400));
            assert_eq!(listed.hwAddr, first.mac.unwrap().to_string());
            assert_eq!(listed.raw_flags, link.flags.bits());
            let own = |v6| {
                let family = family(v6).into();
                listed.IPAddresses.iter().filter(move |address| address.family == family)
            };
            let texts: Vec<_> = own(false).map(|ip| (ip.address.as_str(), ip.mask.as_str())).collect();
            assert_eq!(texts, [("10.0.0.2", "24")]);
            assert!(own(true).any(|ip| (ip.address.as_str(), ip.mask.as_str()) == ("fd00::2", "64")));

            // An MTU of 0 and the same name leave both, and what was silent can speak again.
            update_to(namespace, &interface("eth0", first.mac, &[("10.0.0.3", "24")])).unwrap();
            let link = namespace.link("eth0");
            assert_eq!(link.mtu, 1400);
            assert!(link.is_up() && !link.flags.contains(LinkFlags::Noarp));
            let listed = list(&mut namespace.netlink).unwrap();
            let listed = listed.iter().find(|interface| interface.name == "eth0").unwrap();
            let v4: Vec<_> = listed.IPAddresses.iter().filter(|ip| ip.address.contains('.')).collect();
            assert_eq!(v4.len(), 1);
            assert_eq!(v4[0].address, "10.0.0.3");
            assert_eq!(namespace.link("a1").name, peer.name);
        });
    }

    #[test]
    fn a_link_of_the_name_is_given_the_address_and_none_is_not_found() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("a0", "a1");
            let mac = Mac([2, 0, 0, 0, 0, 7]);
            update_to(namespace, &interface("a0", Some(mac), &[])).unwrap();
            let link = namespace.link("a0");
            assert_eq!((link.index, link.mac), (first.index, Some(mac)));
            assert!(link.is_up());

            let error = update_to(namespace, &interface("eth9", Some(Mac([2; 6])), &[])).unwrap_err();
            assert!(error.to_string().contains("Link not found (Name: eth9)"), "{error}");
            let plugged = update(
                &mut namespace.netlink,
                &Wanted::of(&interface("b0", Some(Mac([2, 0, 0, 0, 0, 8])), &[])).unwrap(),
                Some(first.index),
            );
            assert_eq!(plugged.unwrap(), first.index);
            assert_eq!(namespace.link("b0").mac, Some(Mac([2, 0, 0, 0, 0, 8])));
        });
    }

    #[test]
    fn names_are_swapped_and_the_displaced_link_loses_nothing() {
        Namespace::run(|namespace| {
            let [first, second] = namespace.pair_up("eth0", "eth1");
            let network = Network::default();
            update_to(namespace, &interface("eth1", second.mac, &[("10.0.1.2", "24"), ("fd00:1::2", "64")]))
                .unwrap();
            let route = |dest: &str, gateway: &str| bulkhead_protocol::types::Route {
                dest: dest.into(),
                gateway: gateway.into(),
                device: "eth1".into(),
                ..Default::default()
            };
            let routes = [route("10.9.0.0/16", "10.0.1.1"), route("fd09::/16", "fd00:1::1")];
            network.update_routes(&routes).unwrap();
            let fixed = bulkhead_protocol::types::ARPNeighbor {
                toIPAddress: Some(IPAddress { address: "10.0.1.1".into(), ..Default::default() }).into(),
                device: "eth1".into(),
                lladdr: "02:00:00:00:00:05".into(),
                ..Default::default()
            };
            neighbour::add(&mut namespace.netlink, &[fixed]).unwrap();
            let neighbours =
                |namespace: &mut Namespace| neighbour::fixed(&mut namespace.netlink, second.index);
            assert_eq!(neighbours(namespace), ["10.0.1.1 02:00:00:00:00:05"]);

            update_to(namespace, &interface("eth1", first.mac, &[("10.0.0.2", "24")])).unwrap();
            assert_eq!(namespace.names(), ["eth0", "eth1"]);
            assert_eq!(namespace.link("eth1").index, first.index);
            let displaced = namespace.link("eth0");
            assert!(displaced.index == second.index && displaced.is_up());
            let listed = list(&mut namespace.netlink).unwrap();
            let listed = listed.iter().find(|interface| interface.name == "eth0").unwrap();
            let has = |address: &str| listed.IPAddresses.iter().any(|ip| ip.address == address);
            assert!(has("10.0.1.2") && has("fd00:1::2"));
            let routes = route::list(&mut namespace.netlink).unwrap();
            for dest in ["10.9.0.0/16", "fd09::/16"] {
                assert!(routes.iter().any(|route| route.dest == dest && route.device == "eth0"), "{dest}");
            }
            assert_eq!(neighbours(namespace), ["10.0.1.1 02:00:00:00:00:05"]);
        });
    }

    #[test]
    fn a_refused_change_leaves_no_passing_name_and_no_link_down() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("eth0", "eth1");
            // The third name is taken, so the swap fails at its first step.
            let [_, taken] = namespace.pair("b0", "b1");
            let passing = format!("passing{}", namespace.link("eth1").index);
            namespace.netlink.change(Change::of(taken.index).name(&passing).request()).unwrap();
            let error = update_to(namespace, &interface("eth1", first.mac, &[])).unwrap_err();
            assert!(error.to_string().starts_with("rename the interface eth0 to eth1: "), "{error}");
            assert_eq!(namespace.link("eth0").index, first.index);
            assert!(namespace.link("eth0").is_up() && namespace.link("eth1").is_up());

            let mut wanted = interface("eth0", first.mac, &[]);
            wanted.mtu = 1 << 30;
            let error = update_to(namespace, &wanted).unwrap_err();
            assert!(error.to_string().contains("an MTU of 1073741824: mtu greater than"), "{error}");
            assert!(namespace.link("eth0").is_up());
        });
    }

    #[test]
    fn a_change_that_needs_no_other_name_loses_no_route() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("eth0", "eth1");
            update_to(namespace, &interface("eth0", first.mac, &[("10.0.0.2", "24")])).unwrap();
            let route = route::Route::to("10.8.0.0/16", first.index);
            let create = Request::create(libc::RTM_NEWROUTE, Existing::Append, &route.message());
            namespace.netlink.change(create).unwrap();
            let has = |namespace: &mut Namespace| {
                route::list(&mut namespace.netlink).unwrap().iter().any(|route| route.dest == "10.8.0.0/16")
            };
            assert!(has(namespace));
            let mut wanted = interface("eth0", first.mac, &[("10.0.0.2", "24"), ("10.0.3.2", "24")]);
            wanted.mtu = 1300;
            update_to(namespace, &wanted).unwrap();
            assert!(has(namespace));
            // Nor does another hardware address.
            let mut wanted = interface("eth0", Some(Mac([2, 0, 0, 0, 0, 9])), &[("10.0.0.2", "24")]);
            wanted.mtu = 1300;
            update_to(namespace, &wanted).unwrap();
            assert!(has(namespace));
        });
    }

    #[test]
    fn a_pci_path_is_the_slots_on_the_way() {
        let cases = [
            ("/sys/devices/pci0000:00/0000:00:03.0/virtio1/net/eth0", "03"),
            ("/sys/devices/pci0000:00/0000:00:02.0/0000:01:1f.0/virtio4/net/eth1", "02/1f"),
            ("/sys/devices/pci0000:00/0000:00:05.2/net/eth2", "05.2"),
            ("/sys/devices/platform/LNRO0005:00/virtio0/net/eth0", ""),
            ("/sys/devices/virtual/net/veth0.1:2:3", ""),
        ];
        for (device, path) in cases {
            assert_eq!(pci_path(Path::new(device)), path);
        }
    }
}
