//! A network of a test's own, in a thread that has left the machine's.

use std::time::{Duration, Instant};

use netlink_packet_core::{DefaultNla, Emitable};
use netlink_packet_route::link::LinkHeader;
use nix::sched::{CloneFlags, unshare};

use super::{
    address,
    link::{self, Change, Link},
    netlink::{Existing, Netlink, Request, bytes},
};

/// A fresh network namespace: nothing but a loopback interface, which is up.
pub(super) struct Namespace {
    /// A conversation about it.
    pub(super) netlink: Netlink,
}

/// A request to make a pair of links.
struct Pair(Vec<DefaultNla>);

impl Emitable for Pair {
    fn buffer_len(&self) -> usize {
        LinkHeader::default().buffer_len() + self.0.as_slice().buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        let (header, attributes) = buffer.split_at_mut(LinkHeader::default().buffer_len());
        LinkHeader::default().emit(header);
        self.0.as_slice().emit(attributes);
    }
}

impl Namespace {
    /// Runs a test in one; without root it says that it was skipped.
    pub(super) fn run(test: impl FnOnce(&mut Namespace) + Send + 'static) {
        let thread = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: a network namespace needs root");
                return;
            }
            super::loopback_up().unwrap();
            test(&mut Namespace { netlink: Netlink::open().unwrap() });
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    /// Two links, an end of one cable each; both are down.
    pub(super) fn pair(&mut self, name: &str, peer: &str) -> [Link; 2] {
        let text = |text: &str| [text.as_bytes(), b"\0"].concat();
        let named = |name| DefaultNla::new(3, text(name));
        let end = [bytes(&LinkHeader::default()), bytes(&named(peer))].concat();
        let data = bytes(&DefaultNla::new(1, end));
        let information =
            [bytes(&DefaultNla::new(1, text("veth"))), bytes(&DefaultNla::new(2, data))].concat();
        let pair = Pair(vec![named(name), DefaultNla::new(18, information)]);
        self.netlink.change(Request::create(libc::RTM_NEWLINK, Existing::Append, &pair)).unwrap();
        [self.link(name), self.link(peer)]
    }

    /// As [`Namespace::pair`], and up: the kernel has noticed that each has a carrier and given it a link-local address.
    pub(super) fn pair_up(&mut self, name: &str, peer: &str) -> [Link; 2] {
        let links = self.pair(name, peer);
        for link in &links {
            self.netlink.change(Change::of(link.index).up().request()).unwrap();
        }
        let start = Instant::now();
        loop {
            let addresses = address::list(&mut self.netlink).unwrap();
            let ready = |link: &Link| addresses.iter().any(|address| address.link == link.index);
            if links.iter().all(ready) {
                return [self.link(name), self.link(peer)];
            }
            assert!(start.elapsed() < Duration::from_secs(30), "no carrier");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The link of a name as it is now.
    pub(super) fn link(&mut self, name: &str) -> Link {
        link::named(&link::list(&mut self.netlink).unwrap(), name).unwrap().clone()
    }

    /// The names of all links but the loopback interface, in order.
    pub(super) fn names(&mut self) -> Vec<String> {
        let links = link::list(&mut self.netlink).unwrap();
        let mut names: Vec<_> =
            links.into_iter().filter(|link| !link.is_loopback()).map(|link| link.name).collect();
        names.sort_unstable();
        names
    }
}
