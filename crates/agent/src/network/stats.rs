//! What went through the guest's interfaces. All containers share them, so each container has the figures of all.

use bulkhead_protocol::agent::NetworkStats;

use super::{link, netlink::Netlink};
use crate::error::{During, Result};

/// The figures of each interface but the loopback one.
pub(super) fn read(netlink: &mut Netlink) -> Result<Vec<NetworkStats>> {
    let links = link::list(netlink).during(|| "read the figures of the guest's interfaces".into())?;
    let others = links.into_iter().filter(|link| !link.is_loopback());
    Ok(others
        .map(|link| NetworkStats {
            name: link.name,
            rx_bytes: link.figures.rx_bytes,
            rx_packets: link.figures.rx_packets,
            rx_errors: link.figures.rx_errors,
            rx_dropped: link.figures.rx_dropped,
            tx_bytes: link.figures.tx_bytes,
            tx_packets: link.figures.tx_packets,
            tx_errors: link.figures.tx_errors,
            tx_dropped: link.figures.tx_dropped,
            ..Default::default()
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{address, namespace::Namespace, prefix::Prefix};

    #[test]
    fn what_one_end_sends_the_other_receives() {
        Namespace::run(|namespace| {
            let [first, _] = namespace.pair_up("a0", "a1");
            let own = Prefix::parse_cidr("", "10.0.0.2/24").unwrap();
            address::replace(&mut namespace.netlink, first.index, "a0", &[own]).unwrap();
            let read = |namespace: &mut Namespace| {
                let figures = read(&mut namespace.netlink).unwrap();
                let of = |name: &str| figures.iter().find(|figures| figures.name == name).unwrap().clone();
                assert_eq!(figures.len(), 2, "the loopback interface is left out");
                (of("a0"), of("a1"))
            };
            let (sent, received) = read(namespace);
            let socket = std::net::UdpSocket::bind("10.0.0.2:0").unwrap();
            socket.set_broadcast(true).unwrap();
            socket.send_to(&[0; 1000], "10.0.0.255:9").unwrap();
            let (sent, received) = {
                let (now_sent, now_received) = read(namespace);
                (now_sent.tx_bytes - sent.tx_bytes, now_received.rx_packets - received.rx_packets)
            };
            assert!(sent >= 1042, "{sent} bytes");
            assert!(received >= 1);
        });
    }
}
