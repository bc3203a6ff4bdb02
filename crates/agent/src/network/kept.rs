//! What a link that goes down for a moment would lose, to be given back when it is up again.
//!
//! A link that is up can be given neither another name nor, by most drivers, another hardware address. Set down, it
//! forgets its routes, its IPv6 addresses and its fixed neighbours, even those of a bystander whose name is wanted.

use std::{collections::BTreeSet, io};

use netlink_packet_route::{
    AddressFamily,
    address::AddressMessage,
    neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
    route::{RouteAttribute, RouteHeader, RouteMessage, RouteType},
};

use super::{
    address,
    netlink::{Existing, Netlink, Request},
    route,
};

/// The local table, which the kernel fills.
const RT_TABLE_LOCAL: u8 = 255;

/// What was set on some links by others than the kernel.
#[derive(Default)]
pub(super) struct Kept {
    addresses: Vec<AddressMessage>,
    neighbours: Vec<NeighbourMessage>,
    routes: Vec<RouteMessage>,
}

impl Kept {
    /// What would be lost with these links.
    pub(super) fn of_links(netlink: &mut Netlink, links: &BTreeSet<u32>) -> io::Result<Kept> {
        if links.is_empty() {
            return Ok(Kept::default());
        }
        let addresses = address::list(netlink)?
            .into_iter()
            .filter(|address| links.contains(&address.link) && address.prefix.address.is_ipv6())
            .filter(|address| !address.is_kernels())
            .map(|address| address.message)
            .collect();
        let mut neighbours: Vec<NeighbourMessage> =
            netlink.dump(libc::RTM_GETNEIGH, &NeighbourMessage::default())?;
        neighbours.retain(|neighbour| {
            let header = &neighbour.header;
            links.contains(&header.ifindex)
                && header.state == NeighbourState::Permanent
                && matches!(header.family, AddressFamily::Inet | AddressFamily::Inet6)
        });
        for neighbour in &mut neighbours {
            neighbour.attributes.retain(|attribute| {
                matches!(
                    attribute,
                    NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
                )
            });
        }
        Ok(Kept { addresses, neighbours, routes: routes(netlink, links)? })
    }

    /// Gives it back. What the kernel refuses is told to the log: the change itself was made.
    pub(super) fn restore(self, netlink: &mut Netlink) {
        let create =
            |kind, body: &dyn netlink_packet_core::Emitable| Request::create(kind, Existing::Append, body);
        let replace =
            |kind, body: &dyn netlink_packet_core::Emitable| Request::create(kind, Existing::Replace, body);
        let requests = self
            .addresses
            .iter()
            .map(|address| replace(libc::RTM_NEWADDR, address))
            .chain(self.neighbours.iter().map(|neighbour| replace(libc::RTM_NEWNEIGH, neighbour)))
            .chain(self.routes.iter().map(|route| create(libc::RTM_NEWROUTE, route)));
        for request in requests {
            match netlink.change(request) {
                Err(refusal) if refusal.errno != libc::EEXIST => {
                    tracing::warn!(%refusal, "an interface that was renamed lost an address, a neighbour or a route");
                }
                _ => {}
            }
        }
    }
}

/// Routes of any table but the kernel's own, those first on whose networks the gateways of others are.
fn routes(netlink: &mut Netlink, links: &BTreeSet<u32>) -> io::Result<Vec<RouteMessage>> {
    let mut routes = route::messages(netlink)?;
    routes.retain(|route| {
        let through =
            |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(link) if links.contains(link));
        route.header.kind == RouteType::Unicast
            && route.header.table != RT_TABLE_LOCAL
            && !route::is_kernels(route.header.protocol)
            && route.attributes.iter().any(through)
    });
    for route in &mut routes {
        route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::CacheInfo(_)));
        // The others tell of a state and cannot be asked for.
        route.header = RouteHeader { flags: route.header.flags & route::ASKED, ..route.header.clone() };
    }
    routes.sort_by_key(|route| {
        route.attributes.iter().any(|attribute| matches!(attribute, RouteAttribute::Gateway(_)))
    });
    Ok(routes)
}
