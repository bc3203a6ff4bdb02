//! The guest's network, which all its containers share: links with addresses, routes, neighbours, the packet filter, the
//! resolver's file.
//!
//! ```text
//! service/network ─► Network ─┬► interface ─► link, address, kept ─┐
//!                             ├► routing ───► route ───────────────┼► netlink ─► kernel
//!                             ├► neighbour, stats ─────────────────┘
//!                             └► iptables ─► programs of the guest
//! ```
//! A request is understood whole before the first change. Everything here blocks for the length of a few system calls;
//! programs of the packet filter for theirs.

mod address;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod interface;
mod iptables;
mod kept;
mod link;
mod mac;
#[cfg(test)]
mod namespace;
mod neighbour;
mod netlink;
mod prefix;
mod resolver;
mod route;
mod routing;
mod stats;

use std::{
    collections::BTreeSet,
    process::Command,
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_protocol::{agent::NetworkStats, types};

use crate::{
    error::{During, Error, Result},
    program,
    reaper::Reaper,
    sync::lock,
};
use link::Change;
use netlink::Netlink;

pub(crate) use resolver::write_resolv_conf;

/// A program of the packet filter gets so long; it may wait for another one for half of that.
const PROGRAM: Duration = Duration::from_secs(10);

/// The loopback interface has the first index in every network namespace.
const LOOPBACK: u32 = 1;

/// A request that names more addresses, routes or neighbours is refused: each is held against all the others.
const MOST: usize = 4096;

/// The guest's network. Changes come one after the other: each reads what there is, and then makes it what is wanted.
/// The lock is held by threads that may block, for a talk with the kernel, which cannot hang.
#[derive(Default)]
pub(crate) struct Network {
    /// The links that are the host's: it has updated them, or sent routes for them.
    ours: Mutex<BTreeSet<u32>>,
}

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> Result<()> {
    let what = || "bring the loopback interface up".to_owned();
    Netlink::open().during(what)?.change(Change::of(LOOPBACK).up().request()).during(what)
}

impl Network {
    /// Makes an interface what is wanted; `plugged` is the name of the link when the host told its device's path.
    pub(crate) fn update_interface(
        &self,
        wanted: &types::Interface,
        plugged: Option<&str>,
    ) -> Result<types::Interface> {
        bounded("addresses", wanted.IPAddresses.len())?;
        let understood = interface::Wanted::of(wanted)?;
        let plugged = plugged.map(index_of).transpose()?;
        let mut ours = lock(&self.ours);
        ours.insert(interface::update(&mut talk()?, &understood, plugged)?);
        Ok(wanted.clone())
    }

    /// Makes the routes of the host's links those that are wanted; answers with all there are.
    pub(crate) fn update_routes(&self, wanted: &[types::Route]) -> Result<Vec<types::Route>> {
        bounded("routes", wanted.len())?;
        let wanted = wanted.iter().map(route::Wanted::of).collect::<Result<Vec<_>>>()?;
        let mut ours = lock(&self.ours);
        let mut netlink = talk()?;
        routing::update(&mut netlink, &wanted, &mut ours)?;
        route::list(&mut netlink)
    }

    /// Tells the guest of neighbours.
    pub(crate) fn add_neighbours(&self, neighbours: &[types::ARPNeighbor]) -> Result<()> {
        bounded("neighbours", neighbours.len())?;
        let _changes = lock(&self.ours);
        neighbour::add(&mut talk()?, neighbours)
    }
}

/// All interfaces of the guest.
pub(crate) fn interfaces() -> Result<Vec<types::Interface>> {
    interface::list(&mut talk()?)
}

/// All routes of the guest's main table.
pub(crate) fn routes() -> Result<Vec<types::Route>> {
    route::list(&mut talk()?)
}

/// The figures of the guest's interfaces.
pub(crate) fn stats() -> Result<Vec<NetworkStats>> {
    stats::read(&mut talk()?)
}

/// The rules of the packet filter.
pub(crate) fn ip_tables(reaper: &Arc<Reaper>, v6: bool) -> Result<Vec<u8>> {
    iptables::save(&iptables::DIRECTORIES, v6, |command, input| run(reaper, command, input))
}

/// Sets rules of the packet filter; what the program had to say.
pub(crate) fn set_ip_tables(reaper: &Arc<Reaper>, v6: bool, rules: &[u8]) -> Result<Vec<u8>> {
    iptables::restore(&iptables::DIRECTORIES, v6, rules, |command, input| run(reaper, command, input))
}

fn run(reaper: &Arc<Reaper>, command: Command, input: &[u8]) -> Result<program::Output> {
    program::run(reaper, command, input, PROGRAM)
}

fn bounded(what: &str, count: usize) -> Result<()> {
    if count <= MOST {
        return Ok(());
    }
    Err(Error::Invalid(format!("{count} {what} are more than the {MOST} that one request may have")))
}

fn talk() -> Result<Netlink> {
    Netlink::open().during(|| "open a netlink socket".into())
}

/// The number of a link that was found by its device, before it can be given another name.
fn index_of(name: &str) -> Result<u32> {
    let what = || format!("find the number of the interface {name}");
    let links = link::list(&mut talk()?).during(what)?;
    Ok(link::named(&links, name)?.index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_of_a_new_namespace_comes_up() {
        let up = std::thread::spawn(|| {
            if nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: a network namespace needs root");
                return true;
            }
            loopback_up().unwrap();
            std::net::UdpSocket::bind("127.0.0.1:0")
                .and_then(|socket| socket.send_to(b"x", "127.0.0.1:9"))
                .is_ok()
        });
        assert!(up.join().unwrap());
    }

    #[test]
    fn updates_that_come_at_once_are_made_one_after_the_other() {
        namespace::Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("eth0", "eth1");
            let network = Network::default();
            let address =
                types::IPAddress { address: "10.0.0.2".into(), mask: "24".into(), ..Default::default() };
            let wanted = types::Interface {
                name: "eth0".into(),
                hwAddr: first.mac.unwrap().to_string(),
                IPAddresses: vec![address],
                ..Default::default()
            };
            network.update_interface(&wanted, None).unwrap();
            let routes = |of: u8| {
                let route = |n: u8| types::Route {
                    dest: format!("10.{n}.0.0/16"),
                    gateway: format!("10.0.0.{of}"),
                    device: "eth0".into(),
                    ..Default::default()
                };
                (1..40).map(route).collect::<Vec<_>>()
            };
            for round in 0..20 {
                let together = std::sync::Barrier::new(3);
                std::thread::scope(|scope| {
                    for of in [3, 4, 5] {
                        let (network, together, routes) = (&network, &together, routes(of));
                        scope.spawn(move || {
                            together.wait();
                            network.update_routes(&routes).unwrap();
                        });
                    }
                });
                let all = super::routes().unwrap().into_iter();
                let mut gateways: Vec<_> =
                    all.map(|route| route.gateway).filter(|by| !by.is_empty()).collect();
                assert_eq!(gateways.len(), 39, "round {round}");
                gateways.dedup();
                assert_eq!(gateways.len(), 1, "{gateways:?}");
            }
        });
    }

    #[test]
    fn a_request_of_too_many_things_is_refused() {
        let network = Network::default();
        let many = vec![types::Route { device: "eth0".into(), ..Default::default() }; MOST + 1];
        assert!(matches!(network.update_routes(&many), Err(Error::Invalid(_))));
        let many = vec![types::ARPNeighbor::default(); MOST + 1];
        assert!(matches!(network.add_neighbours(&many), Err(Error::Invalid(_))));
        let many = vec![types::IPAddress::default(); MOST + 1];
        let interface = types::Interface { name: "eth0".into(), IPAddresses: many, ..Default::default() };
        assert!(matches!(network.update_interface(&interface, None), Err(Error::Invalid(_))));
    }
}
