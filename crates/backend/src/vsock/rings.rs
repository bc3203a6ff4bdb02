//! Packets in and out of the guest's two queues.
//!
//! Descriptors are read through virtio-queue's `Reader` and `Writer`, which check every address and length, and take a
//! packet in any number of pieces: newer Linux guests send one packet in many. A ring that makes no sense is left alone,
//! so a guest can break nothing but its own device.

use std::io::{Read, Write};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::GuestMemoryMmap;

use super::{
    device::Device,
    packet::{HEADER_LEN, Header, MAX_PAYLOAD},
};

/// Packets taken or given in one go, so that neither a busy guest nor a busy program keeps the device from all else.
const BATCH: usize = 128;

/// What a look at a queue has brought.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// Buffers were used: the guest may want to know.
    pub(crate) used: bool,
    /// There may be more to do at once.
    pub(crate) more: bool,
}

/// Takes packets that the guest sends, and asks to be kicked for later ones.
pub(crate) fn take(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    scratch: &mut [u8],
    device: &mut Device,
) -> Progress {
    let mut progress = Progress::default();
    let _ = queue.disable_notification(memory);
    let mut rearmed = false;
    for _ in 0..BATCH {
        let Some(chain) = queue.pop_descriptor_chain(memory) else {
            // A packet may have come just before the guest could see that we want a kick: look once more.
            if rearmed || !matches!(queue.enable_notification(memory), Ok(true)) {
                return progress;
            }
            rearmed = true;
            continue;
        };
        rearmed = false;
        let head = chain.head_index();
        take_one(memory, chain, scratch, device);
        if queue.add_used(memory, head, 0).is_err() {
            return progress;
        }
        progress.used = true;
    }
    Progress { more: true, ..progress }
}

fn take_one(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    scratch: &mut [u8],
    device: &mut Device,
) {
    let Ok(mut reader) = Reader::new(memory, chain) else { return };
    let mut header = [0; HEADER_LEN];
    // Without a header there is nobody to answer.
    if reader.read_exact(&mut header).is_err() {
        return;
    }
    let header = Header::decode(&header);
    let len = header.len as usize;
    let complete = len <= MAX_PAYLOAD && reader.read_exact(&mut scratch[..len.min(MAX_PAYLOAD)]).is_ok();
    device.take_packet(&header, complete.then(|| &scratch[..len]));
}

/// Gives the guest the packets there are, as far as it has buffers for them. When buffers are short, asks to be kicked.
pub(crate) fn give(
    queue: &mut Queue,
    memory: &GuestMemoryMmap,
    scratch: &mut [u8],
    device: &mut Device,
) -> Progress {
    let mut progress = Progress::default();
    let _ = queue.disable_notification(memory);
    let mut rearmed = false;
    for _ in 0..BATCH {
        if !device.has_packet() {
            return progress;
        }
        let Some(chain) = queue.pop_descriptor_chain(memory) else {
            if rearmed || !matches!(queue.enable_notification(memory), Ok(true)) {
                return progress;
            }
            rearmed = true;
            continue;
        };
        rearmed = false;
        let head = chain.head_index();
        let Some(used) = give_one(memory, chain, scratch, device) else {
            queue.go_to_previous_position();
            return progress;
        };
        if queue.add_used(memory, head, used).is_err() {
            return progress;
        }
        progress.used = true;
    }
    Progress { more: true, ..progress }
}

/// Bytes written, 0 for a buffer that cannot take a packet; `None` when there is no packet after all.
fn give_one(
    memory: &GuestMemoryMmap,
    chain: DescriptorChain<&GuestMemoryMmap>,
    scratch: &mut [u8],
    device: &mut Device,
) -> Option<u32> {
    let Ok(mut writer) = Writer::new(memory, chain) else { return Some(0) };
    let room = writer.available_bytes().saturating_sub(HEADER_LEN).min(MAX_PAYLOAD);
    if room == 0 {
        return Some(0);
    }
    let (header, len) = device.next_packet(&mut scratch[..room])?;
    let written = writer.write_all(&header.encode()).and_then(|()| writer.write_all(&scratch[..len]));
    if written.is_err() {
        // Cannot happen: the room was counted above.
        return Some(0);
    }
    u32::try_from(HEADER_LEN + len).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

    use super::*;
    use crate::vsock::{
        mock_driver::{CID, Descriptor, Driver, SIZE, flag, packet},
        packet::Op,
    };

    #[test]
    fn a_packet_may_come_in_any_number_of_pieces() {
        let mut driver = Driver::new();
        let (mut program, host_port) = driver.connected(5, 4096);
        let data: Vec<u8> = (0..=255).collect();
        for cuts in
            [&[][..], &[HEADER_LEN], &[10, HEADER_LEN + 1], &[1, 2, 3, 44, 100, 200], &[HEADER_LEN + 255]]
        {
            driver.send_pieces(&packet(Op::Rw, 5, host_port), &data, cuts);
            driver.turn();
            assert!(driver.all_sent());
            let mut got = vec![0; data.len()];
            program.read_exact(&mut got).unwrap();
            assert_eq!(got, data, "{cuts:?}");
        }
    }

    #[test]
    fn a_header_that_promises_too_much_resets_its_connection() {
        for len in [11, 0x1_0001, u32::MAX] {
            let mut driver = Driver::new();
            let (mut program, host_port) = driver.connected(5, 4096);
            let header = Header { len, ..packet(Op::Rw, 5, host_port) };
            driver.send_raw(&[&header.encode()[..], b"0123456789"].concat(), &[]);
            let answer = driver.poll();
            assert_eq!(answer.len(), 1);
            assert_eq!((answer[0].0.op, answer[0].0.dst_port), (Op::Reset as u16, 5), "{len}");
            assert_eq!(program.read(&mut [0]).unwrap(), 0);
        }
    }

    #[test]
    fn senseless_chains_are_given_back_and_answered_with_nothing() {
        let mut driver = Driver::new();
        let next = flag(VRING_DESC_F_NEXT);
        for (addr, len, flags, next) in [
            (0x80_0000, 43, 0, 0),                           // shorter than a header
            (0x80_0000, 0, 0, 0),                            // empty
            (0xffff_ffff_ffff_fff0, 44, 0, 0),               // wraps around
            (0x2_0000_0000, 44, 0, 0),                       // not memory
            (0xff_fff0, 44, 0, 0),                           // ends beyond memory
            (0x80_0000, 44, flag(VRING_DESC_F_WRITE), 0),    // for the device to write
            (0x80_0000, 10, next, 0),                        // a loop
            (0x80_0000, 10, next, SIZE),                     // next one is outside of the table
            (0x80_0000, 16, flag(VRING_DESC_F_INDIRECT), 0), // a table of zeroes
            (0x80_0000, 17, flag(VRING_DESC_F_INDIRECT), 0), // a table of no whole descriptors
            (0x2_0000_0000, 64, flag(VRING_DESC_F_INDIRECT), 0),
        ] {
            driver.send_descriptor(Descriptor { addr, len, flags, next });
            assert!(driver.poll().is_empty(), "{addr:#x} {len} {flags}");
            assert!(driver.all_sent(), "{addr:#x} {len} {flags}");
        }
        // It still works.
        let (_program, _) = driver.connected(5, 4096);
    }

    #[test]
    fn an_impossible_ring_is_left_alone() {
        let mut driver = Driver::new();
        driver.set_tx_avail_idx(SIZE + 1);
        driver.turn();
        driver.turn();
        assert_eq!(driver.tx.next_avail(), 0);
        driver.set_tx_avail_idx(0);
        let (_program, _) = driver.connected(5, 4096);
    }

    #[test]
    fn one_look_takes_a_bounded_number_of_packets() {
        let mut driver = Driver::new();
        for _ in 0..BATCH + 2 {
            driver.send(&Header { src_cid: CID + 1, ..packet(Op::Rw, 1, 1) }, &[]);
        }
        let mut scratch = vec![0; MAX_PAYLOAD];
        let mut look = || take(&mut driver.tx, &driver.memory, &mut scratch, &mut driver.device);
        assert_eq!(look(), Progress { used: true, more: true });
        assert_eq!(look(), Progress { used: true, more: false });
        assert_eq!(look(), Progress::default());
        assert!(driver.all_sent());
    }

    /// Numbers from 0 to `bound` - 1, the same ones each time.
    fn random(seed: u64) -> impl FnMut(u32) -> u32 {
        let mut state = seed;
        move |bound| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u32::try_from(state >> 33).unwrap() % bound
        }
    }

    #[test]
    fn no_sequence_of_packets_breaks_the_device() {
        for seed in 0..20 {
            let mut driver = Driver::new();
            let mut random = random(seed);
            let listener = driver.listen(3);
            let mut programs: Vec<_> = (0..3).map(|_| driver.knock()).collect();
            for program in &mut programs {
                program.write_all(b"CONNECT 2\nx").unwrap();
                program.set_nonblocking(true).unwrap();
            }
            let mut host_ports = vec![3];
            for _ in 0..2000 {
                let header = Header {
                    src_port: random(4),
                    dst_port: host_ports[random(u32::try_from(host_ports.len()).unwrap()) as usize],
                    op: u16::try_from(random(9)).unwrap(),
                    flags: random(5),
                    buf_alloc: random(2) * random(1 << 20),
                    fwd_cnt: random(2) * random(1 << 20),
                    ..packet(Op::Rw, 0, 0)
                };
                // RW and RESPONSE more often: the others soon end a connection.
                let op = [Op::Rw as u16, Op::Response as u16, header.op, header.op][random(4) as usize];
                driver.send(&Header { op, ..header }, &vec![1; random(2) as usize * random(60_000) as usize]);
                driver.send_raw(&header.encode(), &[random(44) as usize]);
                for (header, _) in driver.poll() {
                    if header.op == Op::Request as u16 {
                        host_ports.push(header.src_port);
                    }
                }
                if let Some(program) = programs.get_mut(random(8) as usize) {
                    let _ = program.write(&[1; 5000]);
                    let _ = program.read(&mut [0; 50_000]);
                }
            }
            // Nothing is left over once everybody has gone.
            drop((programs, listener));
            for guest_port in 0..4 {
                for host_port in &host_ports {
                    driver.send(&packet(Op::Reset, guest_port, *host_port), &[]);
                    driver.turn();
                }
            }
            driver.poll();
            assert_eq!(driver.device.occupied(), 0, "seed {seed}");
        }
    }

    #[test]
    fn buffers_too_small_for_a_packet_are_skipped_and_data_is_cut_to_the_others() {
        let mut driver = Driver::new();
        let (mut program, _) = driver.connected(5, 65_536);
        // What was on offer is larger; use it up.
        for byte in 0..SIZE {
            program.write_all(&[u8::try_from(byte).unwrap()]).unwrap();
            driver.turn();
        }
        driver.received();
        program.write_all(&[9; 100]).unwrap();
        driver.offer_all(u32::try_from(HEADER_LEN).unwrap());
        driver.turn();
        assert!(driver.received().is_empty(), "a header alone carries no data");
        driver.offer_all(u32::try_from(HEADER_LEN).unwrap() + 30);
        driver.turn();
        let sizes: Vec<usize> = driver.received().iter().map(|(_, data)| data.len()).collect();
        assert_eq!(sizes, [30, 30, 30, 10]);
    }
}
