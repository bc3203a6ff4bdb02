//! Typed messages between the executor and its children, with descriptors, over a socket pair.
//!
//! ```text
//! parent                                child
//!   Plan + descriptors        ──►
//!                             ◄──       Spawned{pid} + pidfd        from the short-lived one, which ends
//!                             ◄──       Terminal + pty master       if the process has one
//!                             ◄──       Mounted                     create only, if the caller has hooks to run
//!   Continue                  ──►
//!                             ◄──       Ready + its namespaces      create only: parked
//!   Release                   ──►                                   create only
//!                             ◄──       Executing, then end of file when execve has succeeded
//! ```
//! `Failed` may take the place of everything the child says, and is its last word.
//!
//! A frame is its length (u32, native order) and postcard, which both ends have in common: they are one program; descriptors travel with its first byte.

use std::{
    io::{self, IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair, sockopt,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{Stage, plan::Plan};

/// The kernel passes no more descriptors in one message.
const MAX_DESCRIPTORS: usize = 253;
/// Larger than any environment that execve takes.
const MAX_FRAME: usize = 64 << 20;

/// What the parent says.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum ToChild {
    /// What to become. The descriptors are those of [`crate::plan::Descriptors`], in its order.
    Plan(Box<Plan>),
    /// The caller's hooks have been run.
    Continue,
    /// Go on to the command.
    Release,
}

/// What the child says.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FromChild {
    /// The process exists; its pidfd comes along.
    Spawned {
        /// As the parent sees it.
        pid: i32,
    },
    /// The terminal's master comes along.
    Terminal,
    /// Waits for the caller's hooks, with its namespaces and mounts made.
    Mounted,
    /// Parked before the command. The process' namespaces come along, in the plan's order.
    Ready,
    /// execve is next.
    Executing,
    /// It went wrong.
    Failed(Failure),
}

/// A failure in the child.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Failure {
    /// Where.
    pub(crate) stage: Stage,
    /// On what.
    pub(crate) detail: Option<String>,
    /// The errno.
    pub(crate) errno: i32,
}

/// One end of the socket pair.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// Both ends, close-on-exec.
    pub(crate) fn pair() -> io::Result<(Channel, OwnedFd)> {
        let (a, b) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
        Ok((Channel(a), b))
    }

    /// Takes an end over.
    pub(crate) fn new(fd: OwnedFd) -> Channel {
        Channel(fd)
    }

    /// Bounds every later receive.
    pub(crate) fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        Ok(sockopt::set_socket_timeout(&self.0, sockopt::Timeout::Recv, Some(timeout))?)
    }

    /// Sends a message and descriptors.
    pub(crate) fn send<T: Serialize>(&self, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut frame = postcard::to_extend(message, vec![0; 4]).map_err(io::Error::other)?;
        let len = u32::try_from(frame.len() - 4).map_err(io::Error::other)?;
        frame[..4].copy_from_slice(&len.to_ne_bytes());

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("too many descriptors for one message"));
        }
        let mut sent = sendmsg(&self.0, &[IoSlice::new(&frame)], &mut control, SendFlags::NOSIGNAL)?;
        while sent < frame.len() {
            sent += rustix::net::send(&self.0, &frame[sent..], SendFlags::NOSIGNAL)?;
        }
        Ok(())
    }

    /// Receives a message and its descriptors, close-on-exec; `None` at the end.
    pub(crate) fn receive<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut len = [0; 4];
        let mut fds = Vec::new();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::io::retry_on_intr(|| {
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut len)], &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                fds.extend(received);
            }
        }
        if got.bytes == 0 {
            return Ok(None);
        }
        self.fill(&mut len[got.bytes..])?;
        let len = u32::from_ne_bytes(len) as usize;
        if len > MAX_FRAME {
            return Err(io::Error::other(format!("a message of {len} bytes")));
        }
        let mut body = vec![0; len];
        self.fill(&mut body)?;
        Ok(Some((postcard::from_bytes(&body).map_err(io::Error::other)?, fds)))
    }

    fn fill(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let (read, _) =
                rustix::io::retry_on_intr(|| rustix::net::recv(&self.0, &mut *buffer, RecvFlags::empty()))?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            buffer = &mut buffer[read..];
        }
        Ok(())
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};

    use super::*;

    #[test]
    fn messages_arrive_in_order_with_their_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let b = Channel::new(b);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"hello").unwrap();
        a.send(&FromChild::Terminal, &[file.as_fd()]).unwrap();
        a.send(&FromChild::Executing, &[]).unwrap();
        drop(a);

        let (message, fds) = b.receive::<FromChild>().unwrap().unwrap();
        assert_eq!((message, fds.len()), (FromChild::Terminal, 1));
        let mut received = std::fs::File::from(fds.into_iter().next().unwrap());
        received.rewind().unwrap();
        let mut text = String::new();
        received.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        let flags = rustix::io::fcntl_getfd(&received).unwrap();
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));

        assert_eq!(b.receive::<FromChild>().unwrap().unwrap().0, FromChild::Executing);
        assert!(b.receive::<FromChild>().unwrap().is_none());
    }

    #[test]
    fn a_message_larger_than_the_socket_buffer_gets_through() {
        let (a, b) = Channel::pair().unwrap();
        let b = Channel::new(b);
        let text = "x".repeat(5 << 20);
        let sender = std::thread::spawn(move || a.send(&text, &[]));
        let (received, _) = b.receive::<String>().unwrap().unwrap();
        sender.join().unwrap().unwrap();
        assert_eq!(received.len(), 5 << 20);
    }

    #[test]
    fn a_cut_message_is_an_error_and_silence_times_out() {
        let (a, b) = Channel::pair().unwrap();
        rustix::net::send(&b, &[9, 0, 0, 0, b'"'], SendFlags::empty()).unwrap();
        drop(b);
        assert_eq!(a.receive::<String>().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);

        let (a, _b) = Channel::pair().unwrap();
        a.set_timeout(Duration::from_millis(20)).unwrap();
        assert_eq!(a.receive::<String>().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
