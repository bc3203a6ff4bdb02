//! The device as vhost-user sees it: features, configuration, and which queue an event belongs to.

use std::{io, time::Instant};

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringMutex, VringT};
use virtio_bindings::{
    virtio_config::VIRTIO_F_VERSION_1,
    virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC},
};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::{
    epoll::EventSet,
    event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier},
};

use super::{device::Device, packet::MAX_PAYLOAD, rings};

/// Buffers for packets to the guest.
const RX: usize = 0;
/// Packets of the guest.
const TX: usize = 1;
/// Receive, transmit, and events. QEMU keeps the event queue for itself.
const QUEUES: usize = 3;
/// The event number under which [`Device::events`] is to be registered.
pub(crate) const HOST_EVENT: u64 = QUEUES as u64 + 1;

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

/// See the module.
pub(crate) struct VsockBackend {
    device: Device,
    memory: Option<Memory>,
    scratch: Vec<u8>,
    /// Where each queue was left. A queue that is found elsewhere was reset together with its driver; one that was merely
    /// stopped (a paused VM) is found in its place.
    places: [Option<u16>; 2],
}

impl VsockBackend {
    /// Serves a device.
    pub(crate) fn new(device: Device) -> Self {
        Self { device, memory: None, scratch: vec![0; MAX_PAYLOAD], places: [None; 2] }
    }

    /// See [`Device::drain`].
    pub(crate) fn drain(&mut self, deadline: Instant) {
        self.device.drain(deadline);
    }

    fn run(&mut self, vrings: &[VringMutex]) {
        let (Some(memory), [rx, tx, ..]) = (&self.memory, vrings) else { return };
        let memory = memory.memory();
        if [(RX, rx), (TX, tx)].into_iter().any(|(at, vring)| moved(self.places[at], vring)) {
            self.device.guest_restarted();
            self.places = [None; 2];
        }
        let mut more = false;
        for (at, vring) in [(TX, tx), (RX, rx)] {
            let mut state = vring.get_mut();
            if !state.is_enabled() || !state.get_queue().ready() {
                continue;
            }
            let queue = state.get_queue_mut();
            let serve = if at == TX { rings::take } else { rings::give };
            let progress = serve(queue, &memory, &mut self.scratch, &mut self.device);
            self.places[at] = Some(queue.next_avail());
            more |= progress.more;
            // An unreadable ring is signalled too: the guest then looks for itself.
            if progress.used
                && state.needs_notification().unwrap_or(true)
                && let Err(error) = state.signal_used_queue()
            {
                log::warn!("cannot signal the guest: {error}");
            }
        }
        if more {
            self.device.wake();
        }
    }
}

fn moved(place: Option<u16>, vring: &VringMutex) -> bool {
    let state = vring.get_ref();
    state.get_queue().ready() && place.is_some_and(|place| place != state.get_queue().next_avail())
}

impl VhostUserBackendMut for VsockBackend {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // QEMU reads the context id with CONFIG.
        VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    /// The vrings know it.
    fn set_event_idx(&mut self, _enabled: bool) {}

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.device.guest_cid().to_le_bytes();
        let (start, len) = (offset as usize, size as usize);
        config.get(start..start.saturating_add(len)).map(<[u8]>::to_vec).unwrap_or_default()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    /// Ends the worker thread, which dropping the daemon waits for.
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    /// Never fails: an error here would end the worker thread and leave a dead device behind.
    fn handle_event(
        &mut self,
        event: u16,
        _ready: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> io::Result<()> {
        if u64::from(event) == HOST_EVENT {
            self.device.poll_host();
        }
        self.run(vrings);
        Ok(())
    }
}
