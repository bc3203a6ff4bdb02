//! A route: in the words of a request, as this agent thinks of it, and as the kernel has it.

use std::{fmt, io, net::IpAddr};

use bulkhead_protocol::types::{self, IPFamily};
use netlink_packet_route::{
    AddressFamily,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteNextHop,
        RouteProtocol, RouteScope, RouteType,
    },
};

use super::{
    interface::family,
    link,
    netlink::Netlink,
    prefix::{self, Prefix},
};
use crate::error::{During, Error, Result};

/// The flags of a route that can be asked for; the others tell of its state.
pub(super) const ASKED: RouteFlags = RouteFlags::Onlink;

/// The kernel's own measure of an IPv6 route that came without one.
const METRIC_V6: u32 = 1024;

/// A unicast route of the main table.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Route {
    /// Where it leads.
    pub(super) destination: Prefix,
    /// By whom; nobody for what is on the link itself.
    pub(super) gateway: Option<IpAddr>,
    /// The number of the link it goes through.
    pub(super) link: u32,
    /// The guest's own address that it prefers.
    pub(super) source: Option<IpAddr>,
    /// `RT_SCOPE_*`; the kernel keeps none for IPv6.
    pub(super) scope: u8,
    /// `RTNH_F_*`.
    pub(super) flags: RouteFlags,
    /// The largest packet in bytes, 0 for the link's.
    pub(super) mtu: u32,
    /// Of several to one destination the smallest is taken.
    pub(super) metric: u32,
    /// Who made it.
    pub(super) protocol: RouteProtocol,
}

/// A route that a host asks for, by the name of its device.
#[derive(Debug, PartialEq)]
pub(super) struct Wanted {
    /// The device's name.
    pub(super) device: String,
    /// The route, its link not found yet.
    pub(super) route: Route,
}

/// Made by the kernel, which would make it again: for an address, by a router's word or by a redirect.
pub(super) fn is_kernels(protocol: RouteProtocol) -> bool {
    matches!(protocol, RouteProtocol::Kernel | RouteProtocol::Ra | RouteProtocol::IcmpRedirect)
}

impl Wanted {
    /// Understands a request, or says what is wrong with it.
    pub(super) fn of(route: &types::Route) -> Result<Wanted> {
        let what = format!("the route to {:?} on {:?}", route.dest, route.device);
        let invalid = |why: String| Error::Invalid(format!("{what}: {why}"));
        let destination = match route.dest.as_str() {
            "" => None,
            text => Some(Prefix::parse_cidr(&what, text)?.network()),
        };
        let gateway = match route.gateway.as_str() {
            "" => None,
            text => Some(prefix::address(&what, text)?).filter(|address| !address.is_unspecified()),
        };
        let asked_v6 = route.family.enum_value().is_ok_and(|family| family == IPFamily::v6);
        let texts = [destination.map(|prefix| prefix.address), gateway];
        // IPv4 is also what a request has that says nothing.
        let v6 = texts.iter().flatten().next().map_or(asked_v6, |address| address.is_ipv6());
        let source = source(&what, &route.source)?;
        if asked_v6 && !v6 || [gateway, source].iter().flatten().any(|address| address.is_ipv6() != v6) {
            return Err(invalid("it mixes IPv4 and IPv6".into()));
        }
        let scope = u8::try_from(route.scope).map_err(|_| invalid(format!("{} is no scope", route.scope)))?;
        if route.device.is_empty() {
            return Err(invalid("it has no device".into()));
        }
        // Hosts send what their own kernel told them. Without a gateway all is on the link.
        let flags = if gateway.is_some() {
            RouteFlags::from_bits_retain(route.flags) & ASKED
        } else {
            RouteFlags::empty()
        };
        Ok(Wanted {
            device: route.device.clone(),
            route: Route {
                destination: destination.unwrap_or(Prefix::all(v6)),
                gateway,
                link: 0,
                source,
                scope,
                flags,
                mtu: route.mtu,
                metric: if v6 { METRIC_V6 } else { 0 },
                protocol: RouteProtocol::Boot,
            },
        })
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the route to {}", self.route.destination)?;
        if let Some(gateway) = self.route.gateway {
            write!(f, " by {gateway}")?;
        }
        write!(f, " on {}", self.device)
    }
}

/// The preferred source is an address of the guest, so a prefix behind it says nothing more; a network is no address.
fn source(what: &str, text: &str) -> Result<Option<IpAddr>> {
    if text.is_empty() {
        return Ok(None);
    }
    let source = Prefix::parse_cidr(what, text)?;
    if !source.is_host() && source.network() == source {
        return Err(Error::Invalid(format!("{what}: the source {text} is a network, not an address")));
    }
    Ok(Some(source.address).filter(|address| !address.is_unspecified()))
}

impl Route {
    /// It is one of IPv6.
    pub(super) fn is_v6(&self) -> bool {
        self.destination.address.is_ipv6()
    }

    /// As the kernel has it; nothing when it is not a unicast route of the main table.
    pub(super) fn of(message: &RouteMessage) -> Option<Route> {
        let header = &message.header;
        let v6 = match header.address_family {
            AddressFamily::Inet => false,
            AddressFamily::Inet6 => true,
            _ => return None,
        };
        // A cloned one is what was learned about a single destination.
        if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Cloned) {
            return None;
        }
        let mut route = Route {
            destination: Prefix { length: header.destination_prefix_length, ..Prefix::all(v6) },
            gateway: None,
            link: 0,
            source: None,
            scope: header.scope.into(),
            flags: header.flags,
            mtu: 0,
            metric: 0,
            protocol: header.protocol,
        };
        let mut table = u32::from(header.table);
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::MultiPath(hops) => route.take_first_of(hops),
                attribute => route.take(attribute),
            }
        }
        (table == u32::from(RouteHeader::RT_TABLE_MAIN)).then_some(route)
    }

    fn take(&mut self, attribute: &RouteAttribute) {
        match attribute {
            RouteAttribute::Destination(address) => {
                self.destination.address = ip(address).unwrap_or(self.destination.address);
            }
            RouteAttribute::Gateway(address) => self.gateway = ip(address),
            RouteAttribute::PrefSource(address) => self.source = ip(address),
            RouteAttribute::Oif(link) => self.link = *link,
            RouteAttribute::Priority(metric) => self.metric = *metric,
            RouteAttribute::Metrics(metrics) => {
                let mtu = metrics.iter().find_map(|metric| match metric {
                    RouteMetric::Mtu(mtu) => Some(*mtu),
                    _ => None,
                });
                self.mtu = mtu.unwrap_or(0);
            }
            _ => {}
        }
    }

    /// A request has words for one way only.
    fn take_first_of(&mut self, hops: &[RouteNextHop]) {
        if let Some(hop) = hops.first() {
            self.link = hop.interface_index;
            hop.attributes.iter().for_each(|attribute| self.take(attribute));
        }
    }

    /// As the kernel wants it.
    pub(super) fn message(&self) -> RouteMessage {
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: if self.is_v6() { AddressFamily::Inet6 } else { AddressFamily::Inet },
            destination_prefix_length: self.destination.length,
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: self.protocol,
            scope: RouteScope::from(self.scope),
            kind: RouteType::Unicast,
            flags: self.flags & ASKED,
            ..RouteHeader::default()
        };
        if self.destination.length != 0 {
            message.attributes.push(RouteAttribute::Destination(self.destination.address.into()));
        }
        message.attributes.push(RouteAttribute::Oif(self.link));
        message.attributes.extend(self.gateway.map(|address| RouteAttribute::Gateway(address.into())));
        message.attributes.extend(self.source.map(|address| RouteAttribute::PrefSource(address.into())));
        if self.mtu != 0 {
            message.attributes.push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(self.mtu)]));
        }
        if self.metric != 0 {
            message.attributes.push(RouteAttribute::Priority(self.metric));
        }
        message
    }

    fn to_wire(&self, device: String) -> types::Route {
        let text = |address: Option<IpAddr>| address.map(|address| address.to_string()).unwrap_or_default();
        types::Route {
            dest: self.destination.to_string(),
            gateway: text(self.gateway),
            device,
            source: text(self.source),
            scope: self.scope.into(),
            family: family(self.is_v6()).into(),
            flags: self.flags.bits(),
            mtu: self.mtu,
            ..Default::default()
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

/// All routes of all tables, of IPv4 first: the two cannot be read at once.
pub(super) fn messages(netlink: &mut Netlink) -> io::Result<Vec<RouteMessage>> {
    let mut all = Vec::new();
    for address_family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = RouteMessage::default();
        request.header.address_family = address_family;
        let mut routes: Vec<RouteMessage> = netlink.dump(libc::RTM_GETROUTE, &request)?;
        // A kernel without IPv6 answers with what it has.
        routes.retain(|route| route.header.address_family == address_family);
        all.append(&mut routes);
    }
    Ok(all)
}

/// The main table.
pub(super) fn table(netlink: &mut Netlink) -> io::Result<Vec<Route>> {
    Ok(messages(netlink)?.iter().filter_map(Route::of).collect())
}

/// The main table in the words of requests.
pub(super) fn list(netlink: &mut Netlink) -> Result<Vec<types::Route>> {
    let what = || "list the routes of the guest".to_owned();
    let routes = table(netlink).during(what)?;
    let links = link::list(netlink).during(what)?;
    let name = |index| links.iter().find(|link| link.index == index).map(|link| link.name.clone());
    Ok(routes.iter().map(|route| route.to_wire(name(route.link).unwrap_or_default())).collect())
}

#[cfg(test)]
impl Route {
    /// A plain route to what is on a link.
    pub(super) fn to(destination: &str, link: u32) -> Route {
        let request = types::Route { dest: destination.into(), device: "x".into(), ..Default::default() };
        Route { link, scope: 253, ..Wanted::of(&request).unwrap().route }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(dest: &str, gateway: &str) -> types::Route {
        types::Route {
            dest: dest.into(),
            gateway: gateway.into(),
            device: "eth0".into(),
            ..Default::default()
        }
    }

    #[test]
    fn a_request_is_understood() {
        let wanted = |route: types::Route| Wanted::of(&route).unwrap();
        let cases = [
            (request("", "10.0.0.1"), "the route to 0.0.0.0/0 by 10.0.0.1 on eth0"),
            (request("", "fd00::1"), "the route to ::/0 by fd00::1 on eth0"),
            (request("0.0.0.0/0", "10.0.0.1"), "the route to 0.0.0.0/0 by 10.0.0.1 on eth0"),
            (request("10.1.2.3/16", "0.0.0.0"), "the route to 10.1.0.0/16 on eth0"),
            (request("10.1.2.3", ""), "the route to 10.1.2.3/32 on eth0"),
            (request("fd00:1::/32", ""), "the route to fd00:1::/32 on eth0"),
            (types::Route { family: IPFamily::v6.into(), ..request("", "") }, "the route to ::/0 on eth0"),
        ];
        for (route, text) in cases {
            assert_eq!(wanted(route).to_string(), text);
        }
        // RTNH_F_LINKDOWN and RTNH_F_ONLINK.
        let flags =
            |gateway| wanted(types::Route { flags: 16 | 4, ..request("", gateway) }).route.flags.bits();
        assert_eq!((flags("10.0.0.1"), flags("")), (4, 0));
    }

    #[test]
    fn the_source_is_an_address_with_or_without_a_prefix() {
        let source = |text: &str| {
            Wanted::of(&types::Route { source: text.into(), ..request("10.0.0.0/8", "") })
                .map(|wanted| wanted.route.source.map(|address| address.to_string()))
        };
        for text in ["10.0.0.2", "10.0.0.2/32", "10.0.0.2/24"] {
            assert_eq!(source(text).unwrap().as_deref(), Some("10.0.0.2"));
        }
        assert_eq!(source("").unwrap(), None);
        for text in ["10.0.0.0/24", "fd00::1", "x"] {
            assert!(matches!(source(text), Err(Error::Invalid(_))), "{text}");
        }
    }

    #[test]
    fn a_wrong_request_is_refused_by_the_routes_name() {
        let cases = [
            request("10.0.0.0/33", ""),
            request("nowhere", ""),
            request("10.0.0.0/8", "fd00::1"),
            request("10.0.0.0/8", "gateway"),
            types::Route { family: IPFamily::v6.into(), ..request("10.0.0.0/8", "") },
            types::Route { scope: 256, ..request("10.0.0.0/8", "") },
            types::Route { device: String::new(), ..request("10.0.0.0/8", "") },
        ];
        for route in cases {
            let error = Wanted::of(&route).unwrap_err();
            let name = format!("the route to {:?}", route.dest);
            assert!(matches!(&error, Error::Invalid(text) if text.starts_with(&name)), "{error}");
        }
    }

    #[test]
    fn the_kernels_form_keeps_everything() {
        for (dest, gateway, source) in [
            ("10.1.0.0/16", "10.0.0.1", "10.0.0.2"),
            ("fd01::/16", "fd00::1", "fd00::2"),
            ("", "10.0.0.1", ""),
        ] {
            let request = types::Route {
                source: source.into(),
                flags: 4,
                mtu: 1300,
                scope: 0,
                ..request(dest, gateway)
            };
            let route = Route { link: 5, metric: 7, ..Wanted::of(&request).unwrap().route };
            assert_eq!(Route::of(&route.message()), Some(route.clone()));
            assert_eq!(route.to_wire("eth0".into()).gateway, gateway);
        }
        let mut other = Route::to("10.0.0.0/8", 5).message();
        other.attributes.push(RouteAttribute::Table(1000));
        assert_eq!(Route::of(&other), None, "of another table");
    }
}
