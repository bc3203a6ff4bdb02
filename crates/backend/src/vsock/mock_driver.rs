//! A guest's driver for unit tests: two queues in ordinary memory, and the device behind them.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    time::Duration,
};

use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{
    device::Device,
    packet::{HEADER_LEN, HOST_CID, Header, MAX_PAYLOAD, Op, TYPE_STREAM},
    rings,
};

pub(crate) const CID: u64 = 7;
/// Entries of each queue.
pub(crate) const SIZE: u16 = 256;
const RX_RING: GuestAddress = GuestAddress(0x1_0000);
const TX_RING: GuestAddress = GuestAddress(0x2_0000);
/// Offsets in a ring's memory; its descriptors come first.
const AVAIL: u64 = 16 * SIZE as u64;
const USED: u64 = AVAIL + 0x400;
const RX_DATA: u64 = 0x10_0000;
const TX_DATA: u64 = 0x80_0000;
/// Room for one packet to the guest, and from it.
const RX_SLOT: u64 = 0x1000;
const TX_SLOT: u64 = 0x1_1000;

/// A split descriptor.
#[derive(Clone, Copy)]
pub(crate) struct Descriptor {
    pub(crate) addr: u64,
    pub(crate) len: u32,
    pub(crate) flags: u16,
    pub(crate) next: u16,
}

pub(crate) struct Driver {
    pub(crate) memory: GuestMemoryMmap,
    pub(crate) device: Device,
    pub(crate) rx: Queue,
    pub(crate) tx: Queue,
    rx_avail: u16,
    rx_seen: u16,
    tx_avail: u16,
    scratch: Vec<u8>,
    /// Stands for the worker's epoll.
    waiter: Epoll,
    dir: tempfile::TempDir,
}

impl Driver {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let uds = dir.path().join("v");
        let device = Device::new(CID, uds.clone(), UnixListener::bind(&uds).unwrap()).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x100_0000)]).unwrap();
        let (rx, tx) = (queue(RX_RING), queue(TX_RING));
        let scratch = vec![0; MAX_PAYLOAD];
        let waiter = Epoll::new().unwrap();
        waiter.ctl(ControlOperation::Add, device.events(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        Self { waiter, memory, device, rx, tx, rx_avail: 0, rx_seen: 0, tx_avail: 0, scratch, dir }
    }

    /// Where a program that serves `port` of the host would listen.
    pub(crate) fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.dir.path().join(format!("v_{port}"))).unwrap()
    }

    /// A program on the host, before its handshake.
    pub(crate) fn knock(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("v")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// A program on the host and its accepted connection with `guest_port`: `(stream, host port)`.
    pub(crate) fn connected(&mut self, guest_port: u32, buf_alloc: u32) -> (UnixStream, u32) {
        let mut program = self.knock();
        writeln!(program, "CONNECT {guest_port}").unwrap();
        let request = self.poll().pop().unwrap().0;
        assert_eq!((request.op, request.dst_port), (Op::Request as u16, guest_port));
        let host_port = request.src_port;
        self.send(&Header { buf_alloc, ..packet(Op::Response, guest_port, host_port) }, &[]);
        assert!(self.poll().is_empty());
        let mut answer = vec![0; format!("OK {host_port}\n").len()];
        program.read_exact(&mut answer).unwrap();
        assert_eq!(answer, format!("OK {host_port}\n").as_bytes());
        (program, host_port)
    }

    /// Like [`Self::turn`], with buffers offered as far as there is room; returns what the guest got.
    pub(crate) fn poll(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.offer_all(4096);
        self.turn();
        self.received()
    }

    /// Both queues, then host events and both queues for as long as there are such events.
    pub(crate) fn turn(&mut self) {
        loop {
            rings::take(&mut self.tx, &self.memory, &mut self.scratch, &mut self.device);
            rings::give(&mut self.rx, &self.memory, &mut self.scratch, &mut self.device);
            if self.waiter.wait(0, &mut [EpollEvent::default()]).unwrap() == 0 {
                return;
            }
            self.device.poll_host();
        }
    }

    /// Offers all buffers that the device does not have, of `len` bytes each.
    pub(crate) fn offer_all(&mut self, len: u32) {
        let used = self.used_idx(RX_RING);
        while self.rx_avail.wrapping_sub(used) < SIZE {
            let slot = self.rx_avail % SIZE;
            let at = RX_DATA + u64::from(slot) * RX_SLOT;
            self.store(RX_RING, slot, Descriptor { addr: at, len, flags: flag(VRING_DESC_F_WRITE), next: 0 });
            self.rx_avail = self.make_available(RX_RING, self.rx_avail, slot);
        }
    }

    /// What has come since the last call.
    pub(crate) fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        let ring = RX_RING.unchecked_add(USED);
        while self.rx_seen != self.used_idx(RX_RING) {
            let element = ring.unchecked_add(4 + 8 * u64::from(self.rx_seen % SIZE));
            let slot: u32 = self.memory.read_obj(element).unwrap();
            let len: u32 = self.memory.read_obj(element.unchecked_add(4)).unwrap();
            self.rx_seen = self.rx_seen.wrapping_add(1);
            if len == 0 {
                continue;
            }
            let mut bytes = vec![0; len as usize];
            self.memory.read_slice(&mut bytes, GuestAddress(RX_DATA + u64::from(slot) * RX_SLOT)).unwrap();
            let header = Header::decode(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
            packets.push((header, bytes[HEADER_LEN..].to_vec()));
        }
        packets
    }

    /// Queues a packet in one piece; the device sees it at the next turn.
    pub(crate) fn send(&mut self, header: &Header, payload: &[u8]) {
        self.send_pieces(header, payload, &[]);
    }

    /// Queues a packet whose bytes are cut at `cuts`, one descriptor a piece.
    pub(crate) fn send_pieces(&mut self, header: &Header, payload: &[u8], cuts: &[usize]) {
        let header = Header { len: u32::try_from(payload.len()).unwrap(), ..*header };
        self.send_raw(&[&header.encode()[..], payload].concat(), cuts);
    }

    /// Queues any bytes.
    pub(crate) fn send_raw(&mut self, bytes: &[u8], cuts: &[usize]) {
        let first = (self.tx_avail % 8) * 8;
        let at = TX_DATA + u64::from(self.tx_avail % 8) * TX_SLOT;
        self.memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let mut ends = cuts.to_vec();
        ends.push(bytes.len());
        let mut start = 0;
        for (piece, end) in ends.iter().enumerate() {
            let index = first + u16::try_from(piece).unwrap();
            let flags = if piece + 1 < ends.len() { flag(VRING_DESC_F_NEXT) } else { 0 };
            let len = u32::try_from(end - start).unwrap();
            self.store(TX_RING, index, Descriptor { addr: at + start as u64, len, flags, next: index + 1 });
            start = *end;
        }
        self.tx_avail = self.make_available(TX_RING, self.tx_avail, first);
    }

    /// Queues a chain that starts with `descriptor`, whatever it is.
    pub(crate) fn send_descriptor(&mut self, descriptor: Descriptor) {
        let first = (self.tx_avail % 8) * 8;
        self.store(TX_RING, first, descriptor);
        self.tx_avail = self.make_available(TX_RING, self.tx_avail, first);
    }

    /// Whether the device has given back all that was sent.
    pub(crate) fn all_sent(&self) -> bool {
        self.used_idx(TX_RING) == self.tx_avail
    }

    /// Claims that the packets up to `index` are there.
    pub(crate) fn set_tx_avail_idx(&self, index: u16) {
        let at = TX_RING.unchecked_add(AVAIL);
        self.memory.write_obj(index, at.unchecked_add(2)).unwrap();
    }

    fn store(&self, ring: GuestAddress, index: u16, descriptor: Descriptor) {
        let at = ring.unchecked_add(16 * u64::from(index));
        self.memory.write_obj(descriptor.addr, at).unwrap();
        self.memory.write_obj(descriptor.len, at.unchecked_add(8)).unwrap();
        self.memory.write_obj(descriptor.flags, at.unchecked_add(12)).unwrap();
        self.memory.write_obj(descriptor.next, at.unchecked_add(14)).unwrap();
    }

    fn make_available(&self, ring: GuestAddress, index: u16, head: u16) -> u16 {
        let at = ring.unchecked_add(AVAIL);
        self.memory.write_obj(head, at.unchecked_add(4 + 2 * u64::from(index % SIZE))).unwrap();
        let next = index.wrapping_add(1);
        self.memory.write_obj(next, at.unchecked_add(2)).unwrap();
        next
    }

    fn used_idx(&self, ring: GuestAddress) -> u16 {
        let at = ring.unchecked_add(USED);
        self.memory.read_obj(at.unchecked_add(2)).unwrap()
    }
}

/// A packet of the guest.
pub(crate) fn packet(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 256 * 1024,
        ..Header::default()
    }
}

fn queue(at: GuestAddress) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_size(SIZE);
    queue.try_set_desc_table_address(at).unwrap();
    queue.try_set_avail_ring_address(at.unchecked_add(AVAIL)).unwrap();
    queue.try_set_used_ring_address(at.unchecked_add(USED)).unwrap();
    queue.set_ready(true);
    queue
}

pub(crate) fn flag(flag: u32) -> u16 {
    u16::try_from(flag).unwrap()
}
