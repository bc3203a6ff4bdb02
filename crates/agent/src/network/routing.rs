//! The routes that a host wants, held against those that there are: what is missing is added, what is no longer wanted
//! goes.
//!
//! A request is the whole list. What goes is what somebody set (no route of the kernel's, of a router's, of IPv6 link-local
//! or multicast addresses) on an interface that is the host's: one it has updated, or names in the request. Routes of
//! links that containers made for themselves stay. Additions come first, so that no connection is without its route, and a
//! failure among them leaves all the old routes.

use std::{collections::BTreeSet, net::IpAddr};

use super::{
    link::{self, Link},
    netlink::{Existing, Netlink, Request},
    route::{self, Route, Wanted},
};
use crate::error::{During, Error, Result};

/// What is to be done, in this order.
#[derive(Debug, Default, PartialEq)]
struct Plan<'a> {
    /// IPv6 has one route by a gateway, a link and a metric; one that differs in the rest must go first.
    cleared: Vec<&'a Route>,
    /// By what they are called in an error.
    added: Vec<(&'a Wanted, Route)>,
    removed: Vec<&'a Route>,
}

/// Makes the main table what is wanted; `ours` are the links that are the host's, and those of the request become so.
pub(super) fn update(netlink: &mut Netlink, wanted: &[Wanted], ours: &mut BTreeSet<u32>) -> Result<()> {
    let what = || "list the routes of the guest".to_owned();
    let links = link::list(netlink).during(what)?;
    let routes = resolve(wanted, &links)?;
    ours.extend(routes.iter().map(|(_, route)| route.link));
    let existing = route::table(netlink).during(what)?;
    plan(routes, &existing, ours).apply(netlink)
}

/// Finds the devices, sets repeated routes apart by their metric (the first is preferred), and puts routes on a link
/// before those by a gateway, which the kernel must be able to reach.
fn resolve<'a>(wanted: &'a [Wanted], links: &[Link]) -> Result<Vec<(&'a Wanted, Route)>> {
    let mut routes: Vec<(&Wanted, Route)> = Vec::new();
    for wanted in wanted {
        let link = link::named(links, &wanted.device).map_err(|error| match error {
            Error::State(text) => Error::State(format!("{wanted}: {text}")),
            error => error,
        })?;
        let mut route = Route { link: link.index, ..wanted.route.clone() };
        let earlier = || routes.iter().filter(|(_, other)| other.destination == route.destination);
        if earlier().any(|(_, other)| Route { metric: route.metric, ..other.clone() } == route) {
            continue;
        }
        route.metric = route.metric.saturating_add(u32::try_from(earlier().count()).unwrap_or(u32::MAX));
        routes.push((wanted, route));
    }
    routes.sort_by_key(|(_, route)| route.gateway.is_some());
    Ok(routes)
}

fn plan<'a>(routes: Vec<(&'a Wanted, Route)>, existing: &'a [Route], ours: &BTreeSet<u32>) -> Plan<'a> {
    let mut plan = Plan::default();
    for route in existing {
        let kept = routes.iter().any(|(_, wanted)| satisfies(route, wanted));
        if kept || !ours.contains(&route.link) || route::is_kernels(route.protocol) || is_local(route) {
            continue;
        }
        let in_the_way = route.is_v6() && routes.iter().any(|(_, wanted)| same_place(route, wanted));
        if in_the_way { plan.cleared.push(route) } else { plan.removed.push(route) }
    }
    plan.added = routes
        .into_iter()
        .filter(|(_, wanted)| !existing.iter().any(|route| satisfies(route, wanted)))
        .collect();
    plan
}

/// Whether an existing route is what is wanted. The kernel's own route to a link's network is as good as one that was
/// asked for, whatever its scope and metric.
fn satisfies(route: &Route, wanted: &Route) -> bool {
    let kernels = route::is_kernels(route.protocol);
    (route.destination, route.gateway, route.link, route.mtu)
        == (wanted.destination, wanted.gateway, wanted.link, wanted.mtu)
        && route.flags & route::ASKED == wanted.flags
        && (route.source == wanted.source || kernels && wanted.source.is_none())
        && (kernels || route.metric == wanted.metric && (route.is_v6() || route.scope == wanted.scope))
}

fn same_place(route: &Route, wanted: &Route) -> bool {
    (route.destination, route.gateway, route.link, route.metric)
        == (wanted.destination, wanted.gateway, wanted.link, wanted.metric)
}

fn is_local(route: &Route) -> bool {
    match route.destination.address {
        IpAddr::V4(address) => address.is_multicast(),
        IpAddr::V6(address) => address.is_multicast() || address.is_unicast_link_local(),
    }
}

impl Plan<'_> {
    fn apply(&self, netlink: &mut Netlink) -> Result<()> {
        for route in &self.cleared {
            remove(netlink, route)?;
        }
        for (done, (wanted, route)) in self.added.iter().enumerate() {
            let create = Request::create(libc::RTM_NEWROUTE, Existing::Append, &route.message());
            match netlink.change(create) {
                // It differs from one that is there in nothing that a request can say.
                Err(refusal) if refusal.errno == libc::EEXIST => {}
                added => added.during(|| {
                    let all = self.added.len();
                    format!(
                        "add {wanted} ({done} of {all} new routes are there, what is no longer wanted is not removed)"
                    )
                })?,
            }
        }
        self.removed.iter().try_for_each(|route| remove(netlink, route))
    }
}

fn remove(netlink: &mut Netlink, route: &Route) -> Result<()> {
    match netlink.change(Request::change(libc::RTM_DELROUTE, &route.message())) {
        // It went by itself.
        Err(refusal) if refusal.errno == libc::ESRCH => Ok(()),
        removed => removed.during(|| {
            format!("remove the route to {}, after all that are wanted were added", route.destination)
        }),
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::types;
    use netlink_packet_route::route::RouteProtocol;

    use super::*;
    use crate::network::{address, namespace::Namespace, prefix::Prefix};

    fn request(dest: &str, gateway: &str, device: &str) -> types::Route {
        types::Route {
            dest: dest.into(),
            gateway: gateway.into(),
            device: device.into(),
            scope: if gateway.is_empty() { 253 } else { 0 },
            ..Default::default()
        }
    }

    fn wanted(requests: &[types::Route]) -> Vec<Wanted> {
        requests.iter().map(|request| Wanted::of(request).unwrap()).collect()
    }

    /// `eth0` with 10.0.0.2/24 and fd00::2/64, `eth1` with 10.0.1.2/24 and fd00:1::2/64.
    fn two_links(namespace: &mut Namespace) -> [Link; 2] {
        let links = namespace.pair_up("eth0", "eth1");
        for (link, addresses) in
            links.iter().zip([["10.0.0.2/24", "fd00::2/64"], ["10.0.1.2/24", "fd00:1::2/64"]])
        {
            let addresses = addresses.map(|text| Prefix::parse_cidr("", text).unwrap());
            address::replace(&mut namespace.netlink, link.index, &link.name, &addresses).unwrap();
        }
        links
    }

    fn update_to(namespace: &mut Namespace, requests: &[types::Route]) -> Result<()> {
        let links = link::list(&mut namespace.netlink).unwrap();
        let mut ours = links.iter().map(|link| link.index).collect();
        update(&mut namespace.netlink, &wanted(requests), &mut ours)
    }

    /// The routes that are not the kernel's, and those by which they were asked for.
    fn set(namespace: &mut Namespace) -> Vec<String> {
        let routes = route::table(&mut namespace.netlink).unwrap();
        let links = link::list(&mut namespace.netlink).unwrap();
        let mut texts: Vec<_> = routes
            .into_iter()
            .filter(|route| !route::is_kernels(route.protocol))
            .map(|route| {
                let device = links.iter().find(|link| link.index == route.link).unwrap().name.clone();
                Wanted { device, route }.to_string()
            })
            .collect();
        texts.sort_unstable();
        texts
    }

    #[test]
    fn the_table_becomes_what_is_wanted_and_stays_so() {
        Namespace::run(|namespace| {
            two_links(namespace);
            // The way to the gateway comes after the route by it.
            let first = [
                request("", "169.254.1.1", "eth0"),
                request("169.254.1.1/32", "", "eth0"),
                request("10.8.0.0/16", "10.0.1.1", "eth1"),
                request("", "fd00::1", "eth0"),
                request("fd08::/16", "", "eth1"),
            ];
            let texts = [
                "the route to 0.0.0.0/0 by 169.254.1.1 on eth0",
                "the route to 10.8.0.0/16 by 10.0.1.1 on eth1",
                "the route to 169.254.1.1/32 on eth0",
                "the route to ::/0 by fd00::1 on eth0",
                "the route to fd08::/16 on eth1",
            ];
            for _ in 0..2 {
                update_to(namespace, &first).unwrap();
                assert_eq!(set(namespace), texts);
            }
            // Another gateway, another device, less of both families.
            let second = [request("", "10.0.1.1", "eth1"), request("fd08::/16", "fd00::9", "eth0")];
            update_to(namespace, &second).unwrap();
            let texts =
                ["the route to 0.0.0.0/0 by 10.0.1.1 on eth1", "the route to fd08::/16 by fd00::9 on eth0"];
            assert_eq!(set(namespace), texts);
            update_to(namespace, &[]).unwrap();
            assert!(set(namespace).is_empty());
            // The kernel's own are all there: two networks of each family, and the link-local ones.
            assert_eq!(route::table(&mut namespace.netlink).unwrap().len(), 6);
        });
    }

    #[test]
    fn a_route_is_listed_as_it_was_asked_for() {
        Namespace::run(|namespace| {
            two_links(namespace);
            let asked = [
                types::Route {
                    source: "10.0.0.2/32".into(),
                    mtu: 1400,
                    ..request("10.8.0.0/16", "10.0.0.1", "eth0")
                },
                types::Route { flags: 4, ..request("10.9.0.0/16", "192.168.7.7", "eth1") },
                types::Route {
                    source: "fd00::2".into(),
                    mtu: 1400,
                    ..request("fd08::/16", "fd00::1", "eth0")
                },
                request("", "fd00:1::1", "eth1"),
                request("", "10.0.1.1", "eth1"),
            ];
            update_to(namespace, &asked).unwrap();
            let listed = route::list(&mut namespace.netlink).unwrap();
            for asked in asked {
                let v6 = asked.gateway.contains(':');
                let dest = match (asked.dest.as_str(), v6) {
                    ("", true) => "::/0",
                    ("", false) => "0.0.0.0/0",
                    (dest, _) => dest,
                };
                let route = listed.iter().find(|route| route.dest == dest).unwrap();
                assert_eq!((&route.gateway, &route.device), (&asked.gateway, &asked.device));
                assert_eq!(route.source, asked.source.trim_end_matches("/32"));
                assert_eq!((route.flags, route.mtu), (asked.flags, asked.mtu), "{dest}");
                assert_eq!(route.family.value() == 1, v6);
            }
            // What is the kernel's is listed, too.
            let connected = listed.iter().find(|route| route.dest == "10.0.0.0/24").unwrap();
            assert_eq!((connected.source.as_str(), connected.scope), ("10.0.0.2", 253));
        });
    }

    #[test]
    fn only_what_differs_is_changed() {
        Namespace::run(|namespace| {
            two_links(namespace);
            for (dest, gateway) in [("10.8.0.0/16", "10.0.0.1"), ("fd08::/16", "fd00::1")] {
                for mtu in [0, 1400, 1300, 0] {
                    let request = types::Route { mtu, ..request(dest, gateway, "eth0") };
                    update_to(namespace, &[request]).unwrap();
                    let listed = route::list(&mut namespace.netlink).unwrap();
                    let found: Vec<_> =
                        listed.iter().filter(|route| route.dest == dest).map(|route| route.mtu).collect();
                    assert_eq!(found, [mtu], "{dest}");
                }
            }
        });
    }

    #[test]
    fn the_kernels_route_to_a_network_is_neither_replaced_nor_removed() {
        Namespace::run(|namespace| {
            two_links(namespace);
            let routes = |namespace: &mut Namespace| {
                let mut routes = route::table(&mut namespace.netlink).unwrap();
                routes.retain(|route| {
                    ["10.0.0.0/24", "fd00::/64"].contains(&route.destination.to_string().as_str())
                });
                routes
            };
            let before = routes(namespace);
            assert_eq!(before.len(), 2);
            let asked = [request("10.0.0.0/24", "", "eth0"), request("fd00::/64", "", "eth0")];
            update_to(namespace, &asked).unwrap();
            assert_eq!(routes(namespace), before);
            update_to(namespace, &[]).unwrap();
            assert_eq!(routes(namespace), before);
        });
    }

    #[test]
    fn routes_to_one_destination_are_both_kept_and_the_first_is_preferred() {
        Namespace::run(|namespace| {
            let [first, second] = two_links(namespace);
            let asked = [
                request("", "10.0.1.1", "eth1"),
                request("", "10.0.0.1", "eth0"),
                request("", "10.0.1.1", "eth1"),
                request("", "fd00:1::1", "eth1"),
                request("", "fd00::1", "eth0"),
            ];
            for _ in 0..2 {
                update_to(namespace, &asked).unwrap();
                let routes = route::table(&mut namespace.netlink).unwrap();
                for v6 in [false, true] {
                    let mut defaults: Vec<_> = routes
                        .iter()
                        .filter(|route| route.destination == Prefix::all(v6))
                        .map(|route| (route.metric, route.link))
                        .collect();
                    defaults.sort_unstable();
                    let metric = if v6 { 1024 } else { 0 };
                    assert_eq!(defaults, [(metric, second.index), (metric + 1, first.index)]);
                }
            }
        });
    }

    #[test]
    fn a_failure_names_the_route_and_leaves_the_old_ones() {
        Namespace::run(|namespace| {
            two_links(namespace);
            update_to(namespace, &[request("10.7.0.0/16", "10.0.0.1", "eth0")]).unwrap();
            let asked =
                [request("10.8.0.0/16", "10.0.0.1", "eth0"), request("10.9.0.0/16", "192.168.7.7", "eth0")];
            let error = update_to(namespace, &asked).unwrap_err().to_string();
            let name = "add the route to 10.9.0.0/16 by 192.168.7.7 on eth0 (1 of 2 new routes are there";
            assert!(error.starts_with(name) && error.contains("Nexthop has invalid gateway"), "{error}");
            let texts = [
                "the route to 10.7.0.0/16 by 10.0.0.1 on eth0",
                "the route to 10.8.0.0/16 by 10.0.0.1 on eth0",
            ];
            assert_eq!(set(namespace), texts);

            let error = update_to(namespace, &[request("10.8.0.0/16", "", "eth7")]).unwrap_err().to_string();
            assert_eq!(error, "the route to 10.8.0.0/16 on eth7: Link not found (Name: eth7)");
            assert_eq!(set(namespace), texts);
        });
    }

    #[test]
    fn routes_of_links_that_are_not_the_hosts_stay() {
        let route = |dest: &str, link| Route::to(dest, link);
        let existing = [
            route("10.8.0.0/16", 2),
            route("10.9.0.0/16", 3),
            Route { protocol: RouteProtocol::Kernel, ..route("10.0.0.0/24", 2) },
            Route { protocol: RouteProtocol::Ra, ..route("::/0", 2) },
            route("fe80::/64", 2),
            route("224.0.0.0/4", 2),
        ];
        assert_eq!(plan(Vec::new(), &existing, &[2].into()).removed, [&existing[0]]);
        assert_eq!(plan(Vec::new(), &existing, &[].into()), Plan::default());
    }
}
