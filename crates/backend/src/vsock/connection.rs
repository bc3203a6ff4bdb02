//! One connection between a program on the host and a socket in the guest.
//!
//! ```text
//!   host program connects                         guest connects
//!        │ REQUEST to the guest                        │ unix connect succeeded
//!        ▼                 RESPONSE                    ▼
//!    Requested ───────────────────────────────────►  Open ──── RST from either side ──► gone
//!        │ RST, or the program left                    │ SHUTDOWN of both directions
//!        ▼                                             ▼
//!      gone                                        Draining ── host took the rest ────► gone
//! ```
//!
//! `Draining` exists only on the host: the guest got its RST at once and has forgotten the connection, but what it sent
//! before is still delivered.

use super::{
    credit::{Allowance, Window},
    host_end::HostEnd,
    packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND},
};

/// What identifies a connection: there is one guest, so two ports do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// The guest's port.
    pub(crate) guest_port: u32,
    /// The host's port.
    pub(crate) host_port: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Requested { sent: bool },
    Open,
    Draining,
}

/// What is to become of a connection after a packet of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It goes on.
    Keep,
    /// The guest broke the protocol: reset.
    Reset,
    /// The guest has closed it: acknowledge with a reset, then deliver the rest.
    Closed,
}

/// A packet to send, without addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Word {
    /// Operation.
    pub(crate) op: Op,
    /// Flags.
    pub(crate) flags: u32,
    /// Bytes of payload.
    pub(crate) len: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Connection {
    /// Its ports.
    pub(crate) key: Key,
    /// Whether it stands in the queue of those that have something to say to the guest.
    pub(crate) scheduled: bool,
    /// The host's end.
    pub(crate) host: HostEnd,
    stage: Stage,
    window: Window,
    allowance: Allowance,
    /// SHUTDOWN flags that the guest has sent.
    guest_shut: u32,
    /// SHUTDOWN flags that the guest has been sent.
    told_shut: u32,
    owes_response: bool,
    owes_credit: bool,
    asked_credit: bool,
}

impl Connection {
    fn new(key: Key, host: HostEnd, stage: Stage) -> Self {
        Self {
            key,
            scheduled: false,
            host,
            stage,
            window: Window::default(),
            allowance: Allowance::default(),
            guest_shut: 0,
            told_shut: 0,
            owes_response: false,
            owes_credit: false,
            asked_credit: false,
        }
    }

    /// A program on the host wants to reach the guest.
    pub(crate) fn to_guest(key: Key, host: HostEnd) -> Self {
        Self::new(key, host, Stage::Requested { sent: false })
    }

    /// The guest reached a program on the host.
    pub(crate) fn from_guest(key: Key, host: HostEnd, request: &Header) -> Self {
        let mut connection = Self::new(key, host, Stage::Open);
        connection.allowance.update(request.buf_alloc, request.fwd_cnt);
        connection.owes_response = true;
        connection
    }

    /// Takes one packet of the guest, except REQUEST and RST.
    pub(crate) fn hear(&mut self, op: Op, header: &Header, payload: &[u8]) -> Verdict {
        self.allowance.update(header.buf_alloc, header.fwd_cnt);
        // A guest with room need not be asked again until it has none.
        self.asked_credit &= self.allowance.free() == 0;
        match (self.stage, op) {
            (Stage::Requested { sent: true }, Op::Response) => {
                self.stage = Stage::Open;
                self.host.greet(format!("OK {}\n", self.key.host_port).as_bytes());
                Verdict::Keep
            }
            (Stage::Open, Op::Rw) => self.hear_data(payload),
            (Stage::Open, Op::CreditUpdate) => Verdict::Keep,
            (Stage::Open, Op::CreditRequest) => {
                self.owes_credit = true;
                Verdict::Keep
            }
            (Stage::Open, Op::Shutdown) => self.hear_shutdown(header.flags),
            _ => Verdict::Reset,
        }
    }

    fn hear_data(&mut self, payload: &[u8]) -> Verdict {
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        if self.guest_shut & SHUTDOWN_SEND != 0 || !self.window.receive(len) {
            return Verdict::Reset;
        }
        let gone = self.host.send(payload);
        self.window.forward(gone);
        Verdict::Keep
    }

    fn hear_shutdown(&mut self, flags: u32) -> Verdict {
        let new = flags & SHUTDOWN_BOTH & !self.guest_shut;
        self.guest_shut |= new;
        if self.guest_shut == SHUTDOWN_BOTH {
            self.close();
            return Verdict::Closed;
        }
        if new & SHUTDOWN_SEND != 0 {
            self.host.finish();
        }
        if new & SHUTDOWN_RECEIVE != 0 {
            self.host.stop_reading();
        }
        Verdict::Keep
    }

    /// The guest knows this connection no more; only what it sent remains to be delivered.
    pub(crate) fn close(&mut self) {
        self.stage = Stage::Draining;
        self.host.finish();
    }

    /// Passes on what the host's end can take now.
    pub(crate) fn flush(&mut self) {
        let gone = self.host.flush();
        self.window.forward(gone);
    }

    /// Whether nothing is left to do, although the guest will not say so.
    pub(crate) fn is_over(&self) -> bool {
        match self.stage {
            Stage::Requested { .. } => self.host.abandoned(),
            Stage::Open => false,
            Stage::Draining => !self.host.has_queued(),
        }
    }

    /// Whether the guest has heard of this connection and not forgotten it.
    pub(crate) fn known_to_guest(&self) -> bool {
        matches!(self.stage, Stage::Requested { sent: true } | Stage::Open)
    }

    /// Whether [`Self::speak`] may have something to say.
    pub(crate) fn has_word(&self) -> bool {
        match self.stage {
            Stage::Requested { sent } => !sent,
            Stage::Open => {
                self.owes_response
                    || self.owes_credit
                    || self.window.update_due()
                    || self.unsaid_shutdown() != 0
                    || self.host.readable() && (self.allowance.free() > 0 || !self.asked_credit)
            }
            Stage::Draining => false,
        }
    }

    /// The next packet for the guest, its payload put at the start of `room`, which is not empty. Data comes before the
    /// SHUTDOWN that follows it, and an RW packet is never empty: to a Linux guest that would be the end of the stream.
    pub(crate) fn speak(&mut self, room: &mut [u8]) -> Option<Word> {
        let bare = |op| Some(Word { op, flags: 0, len: 0 });
        match self.stage {
            Stage::Requested { sent: false } => {
                self.stage = Stage::Requested { sent: true };
                return bare(Op::Request);
            }
            Stage::Requested { sent: true } | Stage::Draining => return None,
            Stage::Open => {}
        }
        if std::mem::take(&mut self.owes_response) {
            return bare(Op::Response);
        }
        if let Some(len) = self.read_host(room) {
            return Some(Word { op: Op::Rw, flags: 0, len });
        }
        let unsaid = self.unsaid_shutdown();
        if unsaid != 0 {
            self.told_shut |= unsaid;
            return Some(Word { op: Op::Shutdown, flags: self.told_shut, len: 0 });
        }
        if self.owes_credit || self.window.update_due() {
            return bare(Op::CreditUpdate);
        }
        if self.host.readable()
            && self.allowance.free() == 0
            && !std::mem::replace(&mut self.asked_credit, true)
        {
            return bare(Op::CreditRequest);
        }
        None
    }

    /// `(buf_alloc, fwd_cnt)` for the header of a packet that is about to be sent.
    pub(crate) fn credit(&mut self) -> (u32, u32) {
        self.owes_credit = false;
        self.window.tell()
    }

    fn read_host(&mut self, room: &mut [u8]) -> Option<u32> {
        let allowed = usize::try_from(self.allowance.free()).unwrap_or(usize::MAX).min(room.len());
        if allowed == 0 || !self.host.readable() {
            return None;
        }
        let len = u32::try_from(self.host.receive(&mut room[..allowed])?).unwrap_or(u32::MAX);
        self.allowance.spend(len);
        Some(len)
    }

    /// SHUTDOWN flags that the guest should hear.
    fn unsaid_shutdown(&self) -> u32 {
        let send = if self.host.ended() { SHUTDOWN_SEND } else { 0 };
        // Of no interest to a guest that has nothing more to send.
        let refused = self.host.deaf() && self.guest_shut & SHUTDOWN_SEND == 0;
        let receive = if refused { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told_shut
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{ErrorKind, Read, Write},
        net::Shutdown,
    };

    use super::*;
    use crate::vsock::{
        credit::BUF_ALLOC,
        device::tests::ops,
        mock_driver::{Driver, packet},
        packet::MAX_PAYLOAD,
    };

    #[test]
    fn half_closes_and_the_end() {
        let mut driver = Driver::new();
        let (mut program, host_port) = driver.connected(5, 4096);
        program.write_all(b"question").unwrap();
        program.shutdown(Shutdown::Write).unwrap();
        let got = driver.poll();
        assert_eq!(ops(&got), [Op::Rw, Op::Shutdown], "data first, then its end");
        assert_eq!(got[1].0.flags, SHUTDOWN_SEND);
        driver.send(&packet(Op::Rw, 5, host_port), b"answer");
        driver.send(&Header { flags: SHUTDOWN_SEND, ..packet(Op::Shutdown, 5, host_port) }, &[]);
        assert!(driver.poll().is_empty());
        let mut answer = String::new();
        program.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, "answer");
        driver.send(&Header { flags: SHUTDOWN_RECEIVE, ..packet(Op::Shutdown, 5, host_port) }, &[]);
        assert_eq!(ops(&driver.poll()), [Op::Reset], "a connection closed from both sides is acknowledged");
        assert_eq!(driver.device.occupied(), 0);
    }

    #[test]
    fn a_guest_that_receives_no_more_breaks_the_programs_pipe() {
        let mut driver = Driver::new();
        let (mut program, host_port) = driver.connected(5, 4096);
        driver.send(&Header { flags: SHUTDOWN_RECEIVE, ..packet(Op::Shutdown, 5, host_port) }, &[]);
        driver.poll();
        assert_eq!(program.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    }

    #[test]
    fn the_guests_credit_is_respected_and_asked_for_once() {
        let mut driver = Driver::new();
        let (mut program, host_port) = driver.connected(5, 100);
        program.write_all(&[1; 250]).unwrap();
        let got = driver.poll();
        assert_eq!(ops(&got), [Op::Rw, Op::CreditRequest]);
        assert_eq!(got[0].1.len(), 100);
        assert!(driver.poll().is_empty());
        for (fwd_cnt, more) in [(100, 100), (170, 50)] {
            driver.send(&Header { buf_alloc: 100, fwd_cnt, ..packet(Op::CreditUpdate, 5, host_port) }, &[]);
            let got = driver.poll();
            assert_eq!(got[0].1.len(), more);
        }
        driver.send(&packet(Op::CreditRequest, 5, host_port), &[]);
        assert_eq!(ops(&driver.poll()), [Op::CreditUpdate]);
    }

    #[test]
    fn a_guest_that_ignores_our_credit_is_reset_and_memory_stays_bounded() {
        let mut driver = Driver::new();
        let (program, host_port) = driver.connected(5, 100);
        let data = vec![0; MAX_PAYLOAD];
        // The program reads nothing; its socket takes some, our buffer the rest.
        let mut sent = 0;
        let answer = loop {
            driver.send(&packet(Op::Rw, 5, host_port), &data);
            sent += data.len();
            let answer = ops(&driver.poll());
            if answer.contains(&Op::Reset) {
                break answer;
            }
            assert!(sent < 4 * 1024 * 1024, "nothing stops the guest");
        };
        assert!(answer.ends_with(&[Op::Reset]));
        drop(program);
    }

    #[test]
    fn the_guest_hears_of_room_that_a_reading_program_makes() {
        let mut driver = Driver::new();
        let (mut program, host_port) = driver.connected(5, 100);
        let mut allowed = BUF_ALLOC;
        let data = vec![3; MAX_PAYLOAD];
        let (mut sent, mut got) = (0u32, 0u32);
        while sent < 4 << 20 {
            let now = allowed.min(u32::try_from(data.len()).unwrap());
            if now > 0 {
                driver.send(&packet(Op::Rw, 5, host_port), &data[..now as usize]);
                sent += now;
                allowed -= now;
            } else {
                let read = program.read(&mut vec![0; 50_000]).unwrap();
                assert!(read > 0);
                got += u32::try_from(read).unwrap();
            }
            for (header, _) in driver.poll() {
                assert_eq!(header.op, Op::CreditUpdate as u16);
                allowed = header.buf_alloc - (sent - header.fwd_cnt);
            }
        }
        driver.send(&Header { flags: SHUTDOWN_SEND, ..packet(Op::Shutdown, 5, host_port) }, &[]);
        while got < sent {
            driver.turn();
            got += u32::try_from(program.read(&mut vec![0; 50_000]).unwrap()).unwrap();
        }
        driver.turn();
        assert_eq!(program.read(&mut [0]).unwrap(), 0);
    }
}
