//! The guest's network: its loopback interface and its resolver's file.

use std::{fs, path::Path};

use bulkhead_protocol::ports::GUEST_STATE;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::error::{During, Result};

/// Brings the loopback interface up.
pub(crate) fn loopback_up() -> Result<()> {
    let what = || "bring the loopback interface up".to_owned();
    let socket = rustix::net::socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        NETLINK_ROUTE,
    )
    .during(what)?;
    let kernel = netlink::SocketAddrNetlink::new(0, 0);
    rustix::net::sendto(&socket, &link_up(LOOPBACK), SendFlags::empty(), &kernel).during(what)?;
    let mut reply = [0; 1024];
    let (length, _) = rustix::net::recv(&socket, &mut reply, RecvFlags::empty()).during(what)?;
    match error_of(&reply[..length]) {
        0 => Ok(()),
        errno => Err(std::io::Error::from_raw_os_error(errno)).during(what),
    }
}

/// Protocol 0 of the family.
const NETLINK_ROUTE: Option<rustix::net::Protocol> = None;

/// The loopback interface has the first index in every network namespace.
const LOOPBACK: i32 = 1;

/// An RTM_NEWLINK request, acknowledged, that sets IFF_UP: rtnetlink(7), netlink(7).
fn link_up(index: i32) -> Vec<u8> {
    const RTM_NEWLINK: u16 = 16;
    const NLM_F_REQUEST_ACK: u16 = 1 | 4;
    const IFF_UP: u32 = 1;
    let mut message = Vec::with_capacity(32);
    message.extend(32u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend([0; 8]); // sequence and port
    message.extend([0; 4]); // family, padding, device type
    message.extend(index.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes()); // which of the flags are meant
    message
}

/// The errno of an acknowledgement: a negative int behind the header.
fn error_of(reply: &[u8]) -> i32 {
    let code =
        reply.get(16..20).and_then(|code| code.try_into().ok()).map_or(-libc::EBADMSG, i32::from_ne_bytes);
    code.saturating_neg()
}

/// Writes the pod's resolv.conf from lines; no lines, no file. A guest that is the agent's own also resolves by it.
pub(crate) fn write_resolv_conf(lines: &[String], init: bool) -> Result<()> {
    if lines.is_empty() {
        return Ok(());
    }
    let directory = Path::new(GUEST_STATE).join("sandbox");
    let file = directory.join("resolv.conf");
    let what = || format!("write {}", file.display());
    fs::create_dir_all(&directory).during(what)?;
    let text: String = lines.iter().map(|line| format!("{}\n", line.trim())).collect();
    fs::write(&file, &text).during(what)?;
    if init {
        fs::create_dir_all("/etc").during(|| "make /etc".into())?;
        fs::write("/etc/resolv.conf", text).during(|| "write /etc/resolv.conf".into())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_as_long_as_it_says() {
        let message = link_up(LOOPBACK);
        assert_eq!(message.len(), 32);
        assert_eq!(u32::from_ne_bytes(message[..4].try_into().unwrap()), 32);
    }

    #[test]
    fn an_acknowledgement_is_told_from_an_error() {
        let mut reply = vec![0; 16];
        reply.extend(0i32.to_ne_bytes());
        assert_eq!(error_of(&reply), 0);
        reply[16..].copy_from_slice(&(-libc::EPERM).to_ne_bytes());
        assert_eq!(error_of(&reply), libc::EPERM);
        assert_eq!(error_of(&[]), libc::EBADMSG);
    }

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
}
