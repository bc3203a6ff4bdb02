//! What the kernel says about its devices: netlink messages `add@/devices/…` of NUL-terminated `KEY=VALUE`.
//!
//! A listener is a socket of its own, open for as long as one wait lasts: nothing is remembered between waits, a wait that
//! is given up leaves nothing behind, and the kernel bounds what is queued. An event is only the occasion to look at sysfs
//! again, so a lost one (the kernel says when its queue was full) counts as one that matters.

use std::{io, os::fd::OwnedFd};

use rustix::{
    io::Errno,
    net::{AddressFamily, RecvFlags, SocketFlags, SocketType, netlink},
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::sys;

/// A message about a device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Uevent<'a> {
    /// What happened: `add`, `remove`, `change`, `bind`…
    pub(crate) action: &'a str,
    /// The device's directory, from sysfs' root.
    pub(crate) path: &'a str,
    /// What kind of device it is: `block`, `net`, `pci`…
    pub(crate) subsystem: &'a str,
}

impl<'a> Uevent<'a> {
    /// Reads a message. `None`: it is none, or one of udev's, or it does not tell its subsystem.
    pub(crate) fn parse(message: &'a [u8]) -> Option<Uevent<'a>> {
        let mut fields = message.split(|byte| *byte == 0).map(|field| str::from_utf8(field).ok());
        let (action, path) = fields.next()??.split_once('@')?;
        let subsystem = fields.find_map(|field| field?.strip_prefix("SUBSYSTEM="))?;
        (!action.is_empty() && path.starts_with('/')).then_some(Uevent { action, path, subsystem })
    }
}

/// Hears the kernel from its making on.
pub(crate) struct Listener(AsyncFd<OwnedFd>);

/// The group that the kernel itself sends to; udev has another.
const KERNEL_GROUP: u32 = 1;

/// Twice what the kernel puts into a message.
const LONGEST: usize = 8 << 10;

impl Listener {
    /// Has to be called on the runtime.
    pub(crate) fn new() -> io::Result<Listener> {
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            Some(netlink::KOBJECT_UEVENT),
        )?;
        rustix::net::bind(&socket, &netlink::SocketAddrNetlink::new(0, KERNEL_GROUP))?;
        Ok(Listener(sys::watch(socket, Interest::READABLE)?))
    }

    /// Waits for an event about one of the subsystems that is not a removal, or for the word that some were lost.
    pub(crate) async fn next(&self, subsystems: &[&str]) -> io::Result<()> {
        let mut buffer = [0; LONGEST];
        loop {
            let mut ready = self.0.readable().await?;
            let received = ready.try_io(|socket| receive(socket.get_ref(), &mut buffer));
            let message = match received {
                Err(_would_block) => continue,
                Ok(message) => message?,
            };
            let matters = match message {
                Message::Event(length) => buffer
                    .get(..length)
                    .and_then(Uevent::parse)
                    .is_some_and(|event| event.action != "remove" && subsystems.contains(&event.subsystem)),
                Message::Lost => true,
                Message::Foreign => false,
            };
            if matters {
                return Ok(());
            }
        }
    }
}

enum Message {
    /// The kernel's, of so many bytes.
    Event(usize),
    /// There were more than the queue holds, or more bytes than expected.
    Lost,
    /// Any process may send to the group.
    Foreign,
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<Message> {
    match rustix::net::recvfrom(socket, &mut *buffer, RecvFlags::TRUNC) {
        Ok((_, length, from)) => {
            let sender = from.and_then(|from| netlink::SocketAddrNetlink::try_from(from).ok());
            Ok(match sender {
                Some(sender) if sender.pid() == 0 && length <= buffer.len() => Message::Event(length),
                Some(sender) if sender.pid() == 0 => Message::Lost,
                _ => Message::Foreign,
            })
        }
        Err(Errno::NOBUFS) => Ok(Message::Lost),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const DISK: &[u8] = b"add@/devices/pci0000:00/0000:00:02.0/virtio0/block/vda\0ACTION=add\0\
        DEVPATH=/devices/pci0000:00/0000:00:02.0/virtio0/block/vda\0SUBSYSTEM=block\0MAJOR=254\0MINOR=0\0\
        DEVNAME=vda\0DEVTYPE=disk\0SEQNUM=1000\0";

    #[test]
    fn a_message_of_the_kernel_is_read() {
        let event = Uevent::parse(DISK).unwrap();
        assert_eq!((event.action, event.subsystem), ("add", "block"));
        assert!(event.path.ends_with("/block/vda"));
    }

    #[test]
    fn what_is_none_is_none() {
        for message in [
            &b""[..],
            b"\0",
            b"\0\0\0\0",
            b"libudev\0\xfe\xed\xca\xfe\0SUBSYSTEM=block\0",
            b"add@/devices/x",
            b"add@/devices/x\0SUBSYSTEM\0",
            b"@/devices/x\0SUBSYSTEM=block\0",
            b"add@devices/x\0SUBSYSTEM=block\0",
            b"add\0SUBSYSTEM=block\0",
            b"\xff\xff@/\0SUBSYSTEM=block\0",
        ] {
            assert_eq!(Uevent::parse(message), None, "{:?}", message.escape_ascii().to_string());
        }
        // Bytes that are no text are in the way of nothing but their own field.
        assert!(Uevent::parse(b"add@/x\0\xff=\xff\0SUBSYSTEM=net").is_some());
    }

    #[test]
    fn hostile_messages_do_no_harm() {
        for length in 0..DISK.len() {
            let cut = Uevent::parse(&DISK[..length]);
            assert!(cut.is_none_or(|event| "block".starts_with(event.subsystem) && event.action == "add"));
        }
        for byte in [0, b'=', b'@', b'/', 0xff] {
            assert_eq!(Uevent::parse(&[byte; 64 << 10]), None);
        }
        // A xorshift generator: the same thousand messages in every run.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        for _ in 0..1000 {
            let mut message = DISK.to_vec();
            for _ in 0..random() % 8 {
                let at = usize::try_from(random() % message.len() as u64).unwrap();
                message[at] = random().to_le_bytes()[0];
            }
            if let Some(event) = Uevent::parse(&message) {
                assert!(event.path.starts_with('/') && !event.action.is_empty());
            }
        }
    }

    #[tokio::test]
    async fn a_message_that_is_not_the_kernels_is_not_heard() {
        let Ok(listener) = Listener::new() else {
            eprintln!("skipped: no uevents here");
            return;
        };
        let sender = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::KOBJECT_UEVENT),
        )
        .unwrap();
        let own = rustix::net::getsockname(listener.0.get_ref()).unwrap();
        let own = netlink::SocketAddrNetlink::try_from(own).unwrap();
        let to = netlink::SocketAddrNetlink::new(own.pid(), 0);
        if let Err(errno) = rustix::net::sendto(&sender, DISK, rustix::net::SendFlags::empty(), &to) {
            eprintln!("skipped: no message can be forged here ({errno})");
            return;
        }
        let heard = tokio::time::timeout(Duration::from_millis(100), listener.next(&["block"])).await;
        assert!(heard.is_err(), "{heard:?}");
    }
}
