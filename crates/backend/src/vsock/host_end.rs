//! The host's end of a connection: a non-blocking unix stream and the bytes it would not take yet.
//!
//! Readiness is remembered from edge-triggered events: a flag is set by an event and cleared when the socket says that it
//! would block, so a socket that cannot be served now (no credit, no guest buffer) causes no wake-ups.

use std::{
    collections::VecDeque,
    io::{ErrorKind, Read, Write},
    net::Shutdown,
    os::{fd::AsRawFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use nix::sys::socket::{MsgFlags, recv};
use vmm_sys_util::epoll::EventSet;

/// An empty queue larger than this is given back to the allocator.
const KEPT_CAPACITY: usize = 4096;

/// See the module.
#[derive(Debug)]
pub(crate) struct HostEnd {
    stream: UnixStream,
    queued: VecDeque<u8>,
    /// How many of the first queued bytes are ours, not the guest's.
    uncounted: usize,
    /// Data or its end may be waiting.
    readable: bool,
    /// The socket may take bytes.
    writable: bool,
    /// All that the program wrote has been read.
    ended: bool,
    /// The program takes nothing more.
    deaf: bool,
    /// The program has closed its socket.
    hung_up: bool,
    /// The guest sends nothing more; to be passed on once the queue is empty.
    finishing: bool,
}

impl HostEnd {
    /// Wraps a non-blocking stream.
    pub(crate) fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            queued: VecDeque::new(),
            uncounted: 0,
            readable: true,
            writable: true,
            ended: false,
            deaf: false,
            hung_up: false,
            finishing: false,
        }
    }

    /// Notes what an event says.
    pub(crate) fn note(&mut self, events: u32) {
        let any = |set: EventSet| events & set.bits() != 0;
        let broken = EventSet::HANG_UP | EventSet::ERROR;
        self.readable |= !self.ended && any(EventSet::IN | EventSet::READ_HANG_UP | broken);
        self.writable |= any(EventSet::OUT | broken);
        if any(EventSet::HANG_UP) {
            self.hung_up = true;
            self.deaf |= self.queued.is_empty();
        }
    }

    /// Whether [`Self::receive`] may find something.
    pub(crate) fn readable(&self) -> bool {
        self.readable && !self.ended
    }

    /// Whether all that the program wrote, and its end, has been read.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }

    /// Whether the program takes nothing more.
    pub(crate) fn deaf(&self) -> bool {
        self.deaf
    }

    /// Whether the program has gone without leaving anything to read.
    pub(crate) fn abandoned(&self) -> bool {
        let mut byte = [0];
        self.hung_up && !matches!(recv(self.stream.as_raw_fd(), &mut byte, MsgFlags::MSG_PEEK), Ok(1))
    }

    /// Whether bytes wait for the program.
    pub(crate) fn has_queued(&self) -> bool {
        !self.queued.is_empty()
    }

    /// Sends bytes of our own, which do not count as the guest's.
    pub(crate) fn greet(&mut self, bytes: &[u8]) {
        self.uncounted += bytes.len();
        self.queued.extend(bytes);
        self.flush();
    }

    /// Sends bytes of the guest, in order; what the socket does not take is queued. Returns how many of the guest's bytes,
    /// of this call and earlier ones, need no room any more.
    pub(crate) fn send(&mut self, mut bytes: &[u8]) -> u32 {
        if self.deaf {
            return count(bytes.len());
        }
        let mut gone = 0;
        while self.queued.is_empty() && self.writable && !self.deaf && !bytes.is_empty() {
            let written = write_some(&self.stream, bytes);
            let written = self.note_written(written);
            gone += count(written);
            bytes = &bytes[written..];
        }
        if self.deaf {
            return gone + count(bytes.len());
        }
        self.queued.extend(bytes);
        gone
    }

    /// Sends queued bytes as far as the socket takes them; returns how many of the guest's need no room any more.
    pub(crate) fn flush(&mut self) -> u32 {
        let mut gone = 0;
        while !self.queued.is_empty() && self.writable && !self.deaf {
            let written = write_some(&self.stream, self.queued.as_slices().0);
            let written = self.note_written(written);
            self.queued.drain(..written);
            gone += written;
        }
        if self.deaf {
            gone += self.queued.len();
            self.queued.clear();
        }
        if self.queued.is_empty() {
            if self.queued.capacity() > KEPT_CAPACITY {
                self.queued = VecDeque::new();
            }
            self.finish_if_due();
        }
        let ours = self.uncounted.min(gone);
        self.uncounted -= ours;
        count(gone - ours)
    }

    /// The guest sends nothing more: the program sees the end once it has read what is queued.
    pub(crate) fn finish(&mut self) {
        self.finishing = true;
        if self.queued.is_empty() {
            self.finish_if_due();
        }
    }

    /// The guest receives nothing more: the program's writes fail from now on.
    pub(crate) fn stop_reading(&mut self) {
        self.readable = false;
        self.ended = true;
        // Fails only when the program has gone.
        let _ = self.stream.shutdown(Shutdown::Read);
    }

    /// Reads into `room`, which is not empty; `None` when there is nothing now, or nothing more.
    pub(crate) fn receive(&mut self, room: &mut [u8]) -> Option<usize> {
        loop {
            match self.stream.read(room) {
                Ok(0) => {
                    self.ended = true;
                    return None;
                }
                Ok(read) => return Some(read),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    self.readable = false;
                    if error.kind() != ErrorKind::WouldBlock {
                        self.ended = true;
                        self.deaf = true;
                    }
                    return None;
                }
            }
        }
    }

    /// Last words: blocks until the program has taken what is queued, or until `deadline`.
    pub(crate) fn drain(mut self, deadline: Instant) {
        let Some(left) =
            deadline.checked_duration_since(Instant::now()).filter(|left| *left > Duration::ZERO)
        else {
            return;
        };
        if self.deaf
            || self.stream.set_nonblocking(false).and(self.stream.set_write_timeout(Some(left))).is_err()
        {
            return;
        }
        // A program that has gone, or does not read in time, has no more claim.
        let _ = self.stream.write_all(self.queued.make_contiguous());
    }

    /// The number of bytes written, after noting why they were not more.
    fn note_written(&mut self, written: Written) -> usize {
        match written {
            Written::Bytes(written) => return written,
            Written::WouldBlock => self.writable = false,
            Written::Gone => self.deaf = true,
        }
        0
    }

    fn finish_if_due(&mut self) {
        if std::mem::take(&mut self.finishing) {
            // Fails only when the program has gone.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }
}

enum Written {
    Bytes(usize),
    WouldBlock,
    Gone,
}

/// One write; SIGPIPE is ignored in every Rust program.
fn write_some(mut stream: &UnixStream, bytes: &[u8]) -> Written {
    loop {
        match stream.write(bytes) {
            Ok(0) => return Written::Gone,
            Ok(written) => return Written::Bytes(written),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Written::WouldBlock,
            Err(_) => return Written::Gone,
        }
    }
}

/// Byte counts here are bounded by the connection's buffer and a packet.
fn count(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a connection buffers far less than 4 GiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (HostEnd, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        (HostEnd::new(ours), theirs)
    }

    #[test]
    fn what_the_socket_does_not_take_is_queued_in_order_and_only_the_guests_bytes_count() {
        let (mut end, mut program) = pair();
        end.greet(b"OK 1\n");
        let data: Vec<u8> = (0..2_000_000u32).map(|at| at.to_le_bytes()[1]).collect();
        let mut gone = end.send(&data);
        assert!(end.has_queued(), "the socket buffer is smaller than the data");
        end.finish();
        let mut read = vec![0; 5];
        program.read_exact(&mut read).unwrap();
        assert_eq!(read, b"OK 1\n");
        let mut got = Vec::new();
        let mut chunk = [0; 65_536];
        loop {
            let read = program.read(&mut chunk).unwrap();
            if read == 0 {
                break;
            }
            got.extend_from_slice(&chunk[..read]);
            end.note(EventSet::OUT.bits());
            gone += end.flush();
        }
        assert_eq!(gone as usize, data.len());
        assert!(got == data);
        assert_eq!(end.queued.capacity(), 0, "an empty queue keeps no memory");
    }

    #[test]
    fn a_program_that_left_is_deaf_and_its_last_words_are_still_read() {
        let (mut end, mut program) = pair();
        program.write_all(b"bye").unwrap();
        drop(program);
        assert_eq!(end.send(b"lost"), 4, "the guest gets its room back");
        assert!(end.deaf());
        let mut room = [0; 8];
        assert_eq!(end.receive(&mut room), Some(3));
        assert_eq!(end.receive(&mut room), None);
        assert!(end.ended());
    }

    #[test]
    fn half_closes_pass_both_ways() {
        let (mut end, mut program) = pair();
        end.finish();
        assert_eq!(program.read(&mut [0; 1]).unwrap(), 0);
        program.write_all(b"still").unwrap();
        let mut room = [0; 8];
        assert_eq!(end.receive(&mut room), Some(5));
        assert_eq!(end.receive(&mut room), None);
        assert!(!end.ended(), "would block is not the end");
        end.stop_reading();
        assert_eq!(program.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }
}
