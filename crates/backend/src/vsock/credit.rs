//! Credit flow control (virtio 1.2, 5.10.6.3), one direction a type. Counters wrap at 2^32 on both sides.
//!
//! [`Window`] is what we allow the guest to send; [`Allowance`] is what the guest allows us. Both are pure arithmetic, and
//! no header of a hostile guest can make them overflow, underflow or grow a buffer.

use std::num::Wrapping;

/// The receive buffer that each connection offers the guest: the most that is kept for a host program that does not read.
pub(crate) const BUF_ALLOC: u32 = 256 * 1024;

/// Guest to host: our buffer, and what the guest knows about it.
#[derive(Debug, Default)]
pub(crate) struct Window {
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    told: Wrapping<u32>,
}

impl Window {
    /// Takes `len` bytes from the guest; `false` when it may not send that much.
    pub(crate) fn receive(&mut self, len: u32) -> bool {
        let held = (self.received - self.forwarded).0;
        if len > BUF_ALLOC - held {
            return false;
        }
        self.received += Wrapping(len);
        true
    }

    /// `len` of the received bytes have left the buffer.
    pub(crate) fn forward(&mut self, len: u32) {
        debug_assert!(len <= (self.received - self.forwarded).0, "more forwarded than received");
        self.forwarded += Wrapping(len);
    }

    /// `(buf_alloc, fwd_cnt)` for the next header; the guest knows them from then on.
    pub(crate) fn tell(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (BUF_ALLOC, self.forwarded.0)
    }

    /// Whether the guest should hear of free space although there is no other packet to tell it with: it believes that
    /// less than half of the buffer is free, and that is no longer so.
    pub(crate) fn update_due(&self) -> bool {
        let free_as_told = BUF_ALLOC - (self.received - self.told).0.min(BUF_ALLOC);
        self.told != self.forwarded && free_as_told < BUF_ALLOC / 2
    }
}

/// Host to guest: the guest's buffer as it last described it.
#[derive(Debug, Default)]
pub(crate) struct Allowance {
    buf_alloc: u32,
    forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
}

impl Allowance {
    /// What the guest's latest header says.
    pub(crate) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.forwarded = Wrapping(fwd_cnt);
    }

    /// Bytes that may be sent now. A guest that claims to have forwarded more than it was sent gets nothing.
    pub(crate) fn free(&self) -> u32 {
        self.buf_alloc.saturating_sub((self.sent - self.forwarded).0)
    }

    /// `len` bytes, at most [`Self::free`], were sent.
    pub(crate) fn spend(&mut self, len: u32) {
        debug_assert!(len <= self.free(), "sent more than allowed");
        self.sent += Wrapping(len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*: enough to walk many states, and the same ones each time.
    struct Random(u64);

    impl Random {
        fn below(&mut self, bound: u32) -> u32 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            let high = u32::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32).unwrap();
            if bound == 0 { 0 } else { high % bound }
        }
    }

    /// Windows whose counters are about to wrap, and fresh ones.
    fn window(start: u32) -> Window {
        Window { received: Wrapping(start), forwarded: Wrapping(start), told: Wrapping(start) }
    }

    #[test]
    fn window_never_holds_more_than_it_offers_and_never_starves_an_honest_guest() {
        for seed in 1..64 {
            let mut random = Random(seed);
            let start = if seed % 2 == 0 { 0 } else { u32::MAX - random.below(BUF_ALLOC) };
            let mut window = window(start);
            let (mut held, mut known) = (0u32, BUF_ALLOC);
            for _ in 0..4000 {
                let wish = random.below(96 * 1024);
                let send = wish.min(known);
                assert!(window.receive(send), "an honest guest is refused");
                held += send;
                known -= send;
                assert!(held <= BUF_ALLOC);
                let forward = random.below(held + 1);
                window.forward(forward);
                held -= forward;
                if window.update_due() {
                    let (alloc, fwd_cnt) = window.tell();
                    known = alloc - (window.received - Wrapping(fwd_cnt)).0;
                    assert!(!window.update_due(), "an update is not repeated without news");
                }
                // The guest may wait only while its bytes are still held: else nobody would ever wake it.
                assert!(known > 0 || held == BUF_ALLOC, "starved: known {known}, held {held}");
            }
        }
    }

    #[test]
    fn window_refuses_what_was_not_offered() {
        let mut window = window(u32::MAX - 5);
        assert!(window.receive(BUF_ALLOC));
        assert!(!window.receive(1));
        assert!(!window.receive(u32::MAX));
        window.forward(10);
        assert!(window.receive(10));
        assert!(!window.receive(1));
    }

    #[test]
    fn allowance_follows_the_guest_across_the_wrap() {
        let mut allowance =
            Allowance { buf_alloc: 0, forwarded: Wrapping(u32::MAX - 9), sent: Wrapping(u32::MAX - 9) };
        assert_eq!(allowance.free(), 0, "nothing before the guest has spoken");
        allowance.update(100, u32::MAX - 9);
        allowance.spend(60);
        assert_eq!(allowance.free(), 40);
        allowance.update(100, 50);
        assert_eq!(allowance.free(), 100);
    }

    #[test]
    fn allowance_survives_any_header() {
        let mut random = Random(7);
        let mut allowance = Allowance::default();
        for _ in 0..20_000 {
            allowance.update(random.below(u32::MAX), random.below(u32::MAX));
            let free = allowance.free();
            assert!(free <= allowance.buf_alloc);
            allowance.spend(random.below(free).min(free));
        }
        // A shrunken buffer: nothing more until the guest has caught up.
        let mut allowance = Allowance::default();
        allowance.update(1000, 0);
        allowance.spend(900);
        allowance.update(100, 0);
        assert_eq!(allowance.free(), 0);
        // More forwarded than sent.
        allowance.update(100, 901);
        assert_eq!(allowance.free(), 0);
    }
}
