//! The vsock device without its queues: connections, what the guest's packets do to them, and what is to be told to the
//! guest. Everything here is bounded, whatever the guest or the programs on the host do.

use std::{
    collections::VecDeque,
    ffi::OsString,
    io,
    os::{
        fd::{AsRawFd, RawFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::Instant,
};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use vmm_sys_util::{
    epoll::{ControlOperation, Epoll, EpollEvent, EventSet},
    eventfd::{EFD_NONBLOCK, EventFd},
};

use super::{
    connection::{Connection, Key, Verdict},
    credit::BUF_ALLOC,
    door::Door,
    host_end::HostEnd,
    packet::{HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM},
    table::Table,
};

/// Connections and handshakes at a time. Each holds at most [`BUF_ALLOC`] bytes that its program does not read.
const MAX_CONNECTIONS: usize = 512;
/// How many of them only programs on the host can open, so that a guest cannot lock the host out.
const RESERVED_FOR_HOST: usize = 128;
/// Resets for connections that are not there, kept for a guest that gives no buffers; more are dropped.
const MAX_RESETS: usize = 1024;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const WAKE: u64 = 2;
const FIRST_ID: u64 = 16;

/// See the module.
pub(crate) struct Device {
    guest_cid: u64,
    uds: PathBuf,
    epoll: Epoll,
    wake: EventFd,
    door: Door,
    table: Table,
    next_id: u64,
    resets: VecDeque<Header>,
}

impl Device {
    /// A device whose programs connect at `listener`, which is bound at `uds`.
    pub(crate) fn new(guest_cid: u64, uds: PathBuf, listener: UnixListener) -> io::Result<Self> {
        let device = Self {
            guest_cid,
            uds,
            epoll: Epoll::new()?,
            wake: EventFd::new(EFD_NONBLOCK)?,
            door: Door::new(listener)?,
            table: Table::default(),
            next_id: FIRST_ID,
            resets: VecDeque::new(),
        };
        device.watch(
            device.door.listener().as_raw_fd(),
            EventSet::IN | EventSet::EDGE_TRIGGERED,
            LISTENER,
        )?;
        device.watch(device.door.timer.as_raw_fd(), EventSet::IN, TIMER)?;
        device.watch(device.wake.as_raw_fd(), EventSet::IN, WAKE)?;
        Ok(device)
    }

    /// The guest's context id.
    pub(crate) fn guest_cid(&self) -> u64 {
        self.guest_cid
    }

    /// Readable when [`Self::poll_host`] has something to do.
    pub(crate) fn events(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }

    /// Makes [`Self::events`] readable once more.
    pub(crate) fn wake(&self) {
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = self.wake.write(1);
    }

    /// Handles what happened on the host's sockets.
    pub(crate) fn poll_host(&mut self) {
        let mut events = [EpollEvent::default(); 64];
        let count = match self.epoll.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                log::warn!("cannot read host events: {error}");
                return;
            }
        };
        for event in &events[..count] {
            match event.data() {
                LISTENER => self.door.knock(),
                TIMER => self.door.expire(Instant::now()),
                WAKE => {
                    let _ = self.wake.read();
                }
                id => self.host_event(id, event.events()),
            }
        }
        self.accept();
    }

    /// Whether [`Self::next_packet`] may have one.
    pub(crate) fn has_packet(&self) -> bool {
        !self.resets.is_empty() || self.table.has_ready()
    }

    /// The next packet for the guest: its header, and its payload at the start of `room`, which is not empty.
    /// Connections take turns.
    pub(crate) fn next_packet(&mut self, room: &mut [u8]) -> Option<(Header, usize)> {
        if let Some(reset) = self.resets.pop_front() {
            return Some((reset, 0));
        }
        while let Some((id, connection)) = self.table.next_ready() {
            let word = connection.speak(room);
            let header = word.map(|word| {
                let (buf_alloc, fwd_cnt) = connection.credit();
                Header {
                    len: word.len,
                    flags: word.flags,
                    buf_alloc,
                    fwd_cnt,
                    ..self_header(self.guest_cid, connection.key, word.op)
                }
            });
            self.table.schedule(id);
            if let Some(header) = header {
                return Some((header, header.len as usize));
            }
        }
        None
    }

    /// Takes one packet of the guest. `payload` is `None` when the guest's buffer does not hold what the header promises.
    pub(crate) fn take_packet(&mut self, header: &Header, payload: Option<&[u8]>) {
        // Not from this guest's address: there is nobody to answer.
        if header.src_cid != self.guest_cid {
            return;
        }
        let op = Op::from_wire(header.op);
        let key = Key { guest_port: header.src_port, host_port: header.dst_port };
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            if op != Some(Op::Reset) {
                self.refuse(header);
            }
            return;
        }
        let id = self.table.find(key);
        match (op, id) {
            (Some(Op::Reset), id) => self.guest_reset(id),
            (Some(Op::Request), None) => self.guest_connects(key, header),
            (_, None) => self.refuse(header),
            (None | Some(Op::Request), Some(id)) => self.reset(id),
            (Some(op), Some(id)) => self.hear(id, op, header, payload),
        }
    }

    /// The guest's driver has started anew: it remembers no connection.
    pub(crate) fn guest_restarted(&mut self) {
        self.resets.clear();
        for id in self.table.known_to_guest() {
            self.guest_reset(Some(id));
        }
    }

    /// Delivers what the guest has sent, at most until `deadline`, and ends all connections.
    pub(crate) fn drain(&mut self, deadline: Instant) {
        for connection in self.table.drain() {
            connection.host.drain(deadline);
        }
    }

    fn hear(&mut self, id: u64, op: Op, header: &Header, payload: Option<&[u8]>) {
        let (Some(connection), Some(payload)) = (self.table.get_mut(id), payload) else {
            return self.reset(id);
        };
        match connection.hear(op, header, payload) {
            Verdict::Keep => self.table.schedule(id),
            Verdict::Reset => self.reset(id),
            Verdict::Closed => {
                let reset = self_header(self.guest_cid, connection.key, Op::Reset);
                self.answer(reset);
                self.forget(id);
            }
        }
    }

    fn guest_connects(&mut self, key: Key, header: &Header) {
        if self.occupied() + RESERVED_FOR_HOST >= MAX_CONNECTIONS {
            return self.refuse(header);
        }
        let Ok(stream) = connect_program(&self.uds, key.host_port) else {
            return self.refuse(header);
        };
        let id = self.new_id();
        if self.watch_stream(&stream, id) {
            self.table.insert(id, Connection::from_guest(key, HostEnd::new(stream), header));
        } else {
            self.refuse(header);
        }
    }

    fn guest_reset(&mut self, id: Option<u64>) {
        if let Some(connection) = id.and_then(|id| self.table.get_mut(id)) {
            connection.close();
        }
        if let Some(id) = id {
            self.forget(id);
        }
    }

    /// The guest has no more to do with this connection: frees its ports, and itself unless there is data to deliver.
    fn forget(&mut self, id: u64) {
        self.table.free_ports(id);
        if self.table.get_mut(id).is_some_and(|connection| connection.is_over()) {
            self.remove(id);
        }
    }

    /// Ends a connection on both sides at once.
    fn reset(&mut self, id: u64) {
        if let Some(connection) = self.table.get_mut(id) {
            let reset = self_header(self.guest_cid, connection.key, Op::Reset);
            self.answer(reset);
            self.remove(id);
        }
    }

    fn refuse(&mut self, header: &Header) {
        self.answer(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }

    fn answer(&mut self, reset: Header) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back(reset);
        }
    }

    fn host_event(&mut self, id: u64, events: u32) {
        if let Some((stream, port)) = self.door.advance(id, events) {
            let key = Key { guest_port: port, host_port: self.table.free_host_port(port) };
            self.table.insert(id, Connection::to_guest(key, HostEnd::new(stream)));
        }
        let Some(connection) = self.table.get_mut(id) else { return };
        connection.host.note(events);
        connection.flush();
        if !connection.is_over() {
            return self.table.schedule(id);
        }
        if connection.known_to_guest() {
            self.reset(id);
        } else {
            self.remove(id);
        }
    }

    fn accept(&mut self) {
        while self.occupied() < MAX_CONNECTIONS {
            let Some(stream) = self.door.next() else { return };
            let id = self.new_id();
            if self.watch_stream(&stream, id) {
                self.door.admit(id, stream);
            }
        }
    }

    /// Connections and handshakes, together at most [`MAX_CONNECTIONS`].
    pub(crate) fn occupied(&self) -> usize {
        self.table.len() + self.door.visitors()
    }

    fn remove(&mut self, id: u64) {
        if self.table.remove(id).is_some() && self.occupied() + 1 == MAX_CONNECTIONS {
            // Programs may have waited for this place.
            self.wake();
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn watch_stream(&self, stream: &UnixStream, id: u64) -> bool {
        let all = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
        let watched = self.watch(stream.as_raw_fd(), all, id);
        if let Err(error) = &watched {
            log::warn!("cannot watch a host connection: {error}");
        }
        watched.is_ok()
    }

    fn watch(&self, fd: RawFd, events: EventSet, id: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, id))
    }
}

/// A packet from the host's end of a connection.
fn self_header(guest_cid: u64, key: Key, op: Op) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: guest_cid,
        src_port: key.host_port,
        dst_port: key.guest_port,
        kind: TYPE_STREAM,
        op: op as u16,
        ..Header::default()
    }
}

/// Connects to the program that serves `port` on the host, at `<uds>_<port>`. Never waits: a program whose queue is full
/// refuses.
fn connect_program(uds: &Path, port: u32) -> nix::Result<UnixStream> {
    let mut path = OsString::from(uds);
    path.push(format!("_{port}"));
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let stream = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(Path::new(&path))?)?;
    Ok(stream.into())
}

const _: () = assert!(MAX_PAYLOAD <= BUF_ALLOC as usize, "a full packet must fit into an empty buffer");

#[cfg(test)]
pub(crate) mod tests {
    use std::io::{ErrorKind, Read, Write};

    use super::*;
    use crate::vsock::{
        mock_driver::{CID, Driver, packet},
        packet::SHUTDOWN_BOTH,
    };

    pub(crate) fn ops(packets: &[(Header, Vec<u8>)]) -> Vec<Op> {
        packets.iter().map(|(header, _)| Op::from_wire(header.op).unwrap()).collect()
    }

    #[test]
    fn a_program_waits_for_the_guests_driver_and_hears_of_a_refusal() {
        let mut driver = Driver::new();
        let mut program = driver.knock();
        program.write_all(b"CONNECT 1024\nearly").unwrap();
        // No buffers yet: the guest's driver is not up.
        driver.turn();
        assert!(driver.device.has_packet());
        let got = driver.poll();
        assert_eq!(ops(&got), [Op::Request]);
        assert_eq!((got[0].0.src_cid, got[0].0.dst_cid, got[0].0.dst_port), (HOST_CID, CID, 1024));
        assert_eq!(got[0].0.buf_alloc, BUF_ALLOC);
        driver.send(&packet(Op::Reset, 1024, got[0].0.src_port), &[]);
        assert!(driver.poll().is_empty());
        // The end comes as a reset when the program had already sent something.
        assert!(matches!(
            program.read(&mut [0]).map_err(|error| error.kind()),
            Ok(0) | Err(ErrorKind::ConnectionReset)
        ));
    }

    #[test]
    fn data_sent_before_the_answer_follows_it() {
        let mut driver = Driver::new();
        let mut program = driver.knock();
        program.write_all(b"CONNECT 9\nearly").unwrap();
        let request = driver.poll()[0].0;
        assert!(driver.poll().is_empty(), "nothing before the guest has accepted");
        driver.send(&packet(Op::Response, 9, request.src_port), &[]);
        let got = driver.poll();
        assert_eq!(ops(&got), [Op::Rw]);
        assert_eq!(got[0].1, b"early");
    }

    #[test]
    fn a_program_that_gives_up_takes_its_request_along() {
        let mut driver = Driver::new();
        for _ in 0..3 * MAX_CONNECTIONS {
            let mut program = driver.knock();
            program.write_all(b"CONNECT 1024\n").unwrap();
            driver.turn();
            drop(program);
            driver.turn();
        }
        assert_eq!(driver.device.occupied(), 0);
        assert!(!driver.device.has_packet(), "nothing is kept for a guest that is not up");
        // Once the guest has heard of it, it must hear of the end.
        let mut program = driver.knock();
        program.write_all(b"CONNECT 1024\n").unwrap();
        assert_eq!(ops(&driver.poll()), [Op::Request]);
        drop(program);
        assert_eq!(ops(&driver.poll()), [Op::Reset]);
    }

    #[test]
    fn what_the_guest_sent_before_it_closed_is_delivered() {
        for last in [Op::Shutdown, Op::Reset] {
            let mut driver = Driver::new();
            let (mut program, host_port) = driver.connected(5, 4096);
            let data = vec![7; MAX_PAYLOAD];
            // The most that may be in flight: more than a unix socket takes.
            for _ in 0..4 {
                driver.send(&packet(Op::Rw, 5, host_port), &data);
                driver.turn();
            }
            driver.send(&Header { flags: SHUTDOWN_BOTH, ..packet(last, 5, host_port) }, &[]);
            let answer = ops(&driver.poll());
            assert_eq!(answer.contains(&Op::Reset), last == Op::Shutdown, "{answer:?}");
            let mut got = 0;
            loop {
                let read = program.read(&mut [0; 10_000]).unwrap();
                got += read;
                driver.turn();
                if read == 0 {
                    break;
                }
            }
            assert_eq!(got, 4 * data.len());
            assert_eq!(driver.device.occupied(), 0);
            assert!(driver.received().is_empty(), "a forgotten connection is not mentioned again");
        }
    }

    #[test]
    fn the_guest_reaches_programs_that_listen_and_no_others() {
        let mut driver = Driver::new();
        let listener = driver.listen(77);
        driver.send(&packet(Op::Request, 1030, 77), &[]);
        driver.send(&packet(Op::Request, 1031, 78), &[]);
        let got = driver.poll();
        assert_eq!(ops(&got), [Op::Reset, Op::Response]);
        assert_eq!((got[0].0.src_port, got[0].0.dst_port), (78, 1031));
        let (mut program, _) = listener.accept().unwrap();
        program.write_all(b"hi").unwrap();
        assert_eq!(driver.poll()[0].1, b"hi");
        drop(program);
        let got = driver.poll();
        assert_eq!(ops(&got), [Op::Shutdown]);
        assert_eq!(got[0].0.flags, SHUTDOWN_BOTH);
        driver.send(&packet(Op::Reset, 1030, 77), &[]);
        driver.poll();
        assert_eq!(driver.device.occupied(), 0);
    }

    #[test]
    fn violations_are_reset_and_foreign_packets_ignored() {
        let mut driver = Driver::new();
        let stranger = |op| packet(op, 1, 2);
        for (header, answered) in [
            (stranger(Op::Rw), true),
            (stranger(Op::Response), true),
            (stranger(Op::Shutdown), true),
            (stranger(Op::CreditUpdate), true),
            (stranger(Op::Reset), false),
            (Header { op: 0, ..stranger(Op::Rw) }, true),
            (Header { op: 99, ..stranger(Op::Rw) }, true),
            (Header { kind: 2, ..stranger(Op::Request) }, true),
            (Header { kind: 2, ..stranger(Op::Reset) }, false),
            (Header { dst_cid: 9, ..stranger(Op::Request) }, true),
            (Header { src_cid: 9, ..stranger(Op::Request) }, false),
        ] {
            driver.send(&header, &[]);
            let got = driver.poll();
            assert_eq!(got.len(), usize::from(answered), "{header:?}");
            for (answer, _) in got {
                assert_eq!((answer.op, answer.kind), (Op::Reset as u16, header.kind));
                assert_eq!((answer.src_cid, answer.dst_cid), (header.dst_cid, CID));
            }
        }
        for header in
            [packet(Op::Request, 5, 0), packet(Op::Response, 5, 0), Header { op: 42, ..packet(Op::Rw, 5, 0) }]
        {
            let (mut program, host_port) = driver.connected(5, 100);
            driver.send(&Header { dst_port: host_port, ..header }, &[]);
            assert_eq!(ops(&driver.poll()), [Op::Reset]);
            assert_eq!(program.read(&mut [0]).unwrap(), 0);
        }
        assert_eq!(driver.device.occupied(), 0);
    }

    #[test]
    fn a_flood_of_bad_packets_leaves_bounded_answers() {
        let mut driver = Driver::new();
        for port in 0..8 * 1024 {
            driver.send(&packet(Op::Rw, port, port), &[]);
            driver.turn();
        }
        assert!(driver.device.resets.len() <= MAX_RESETS);
    }

    #[test]
    fn a_guest_cannot_lock_the_host_out() {
        let mut driver = Driver::new();
        let listener = driver.listen(77);
        let mut programs = Vec::new();
        let mut refused = 0;
        for port in 0..u32::try_from(MAX_CONNECTIONS).unwrap() {
            driver.send(&packet(Op::Request, 2000 + port, 77), &[]);
            match ops(&driver.poll())[..] {
                [Op::Response] => programs.push(listener.accept().unwrap().0),
                _ => refused += 1,
            }
        }
        assert_eq!(refused, RESERVED_FOR_HOST);
        let (_program, _) = driver.connected(5, 100);
        // And the host's own crowd waits outside until there is room again.
        let crowd: Vec<_> = (0..RESERVED_FOR_HOST + 10).map(|_| driver.knock()).collect();
        driver.turn();
        assert_eq!(driver.device.occupied(), MAX_CONNECTIONS);
        drop(crowd);
        driver.turn();
        driver.turn();
        let (_program, _) = driver.connected(6, 100);
    }

    #[test]
    fn a_restarted_driver_starts_without_connections() {
        let mut driver = Driver::new();
        let (mut known, _) = driver.connected(5, 100);
        let mut waiting = driver.knock();
        waiting.write_all(b"CONNECT 8\n").unwrap();
        driver.device.poll_host();
        driver.device.guest_restarted();
        assert_eq!(known.read(&mut [0]).unwrap(), 0);
        assert_eq!(ops(&driver.poll()), [Op::Request], "who still waits is not concerned");
    }

    #[test]
    fn last_words_are_delivered_when_the_vmm_is_gone() {
        let mut driver = Driver::new();
        let (mut program, host_port) = driver.connected(5, 100);
        for _ in 0..4 {
            driver.send(&packet(Op::Rw, 5, host_port), &vec![1; MAX_PAYLOAD]);
            driver.turn();
        }
        let reader = std::thread::spawn(move || {
            let mut all = Vec::new();
            program.read_to_end(&mut all).unwrap();
            all.len()
        });
        driver.device.drain(Instant::now() + std::time::Duration::from_secs(10));
        assert_eq!(reader.join().unwrap(), 4 * MAX_PAYLOAD);
    }
}
