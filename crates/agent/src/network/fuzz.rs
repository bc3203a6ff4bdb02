//! What the kernel and the hosts say of the network, as anybody might say it.

use bulkhead_protocol::{protobuf::Message, types};
use netlink_packet_core::Parseable;
use netlink_packet_route::{address::AddressMessage, route::RouteMessage};

use super::{
    address::Address,
    interface,
    link::{self, Link},
    neighbour::Neighbour,
    netlink::{self, Dump},
    route::{self, Route},
};

/// A datagram, and its messages as links, addresses and routes. A route that is understood can be written.
pub(crate) fn netlink(data: &[u8]) {
    let Ok(bodies) = Dump::of_datagram(data) else { return };
    for body in bodies.iter().map(Vec::as_slice).chain([data]) {
        let _ = Link::parse(body);
        let _ = AddressMessage::parse(body).map(Address::of);
        if let Some(route) = RouteMessage::parse(body).ok().and_then(|message| Route::of(&message)) {
            netlink::bytes(&route.message());
        }
    }
}

/// A request. A link's name is one, and a route that is understood can be written.
pub(crate) fn request(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    match first % 3 {
        0 => {
            if let Ok(interface) = types::Interface::parse_from_bytes(data)
                && interface::Wanted::of(&interface).is_ok()
            {
                assert!(interface.name.is_empty() || link::check_name(&interface.name).is_ok());
            }
        }
        1 => {
            if let Some(wanted) =
                types::Route::parse_from_bytes(data).ok().and_then(|route| route::Wanted::of(&route).ok())
            {
                netlink::bytes(&wanted.route.message());
            }
        }
        _ => {
            if let Ok(neighbour) = types::ARPNeighbor::parse_from_bytes(data)
                && let Ok(neighbour) = Neighbour::of(&neighbour)
            {
                netlink::bytes(&neighbour.message(1));
            }
        }
    }
}
