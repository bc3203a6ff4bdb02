//! The unix socket on which host programs connect, up to the point where each has said which port it wants.

use std::{
    collections::HashMap,
    io::ErrorKind,
    os::unix::net::{UnixListener, UnixStream},
    time::{Duration, Instant},
};

use vmm_sys_util::{epoll::EventSet, timerfd::TimerFd};

use super::handshake::{self, Progress};

/// How long a program may take to say which port it wants.
const PATIENCE: Duration = Duration::from_secs(10);

struct Visitor {
    stream: UnixStream,
    since: Instant,
}

/// See the module.
pub(crate) struct Door {
    listener: UnixListener,
    /// Expires when the visitor that came first has been silent for too long.
    pub(crate) timer: TimerFd,
    armed: bool,
    /// More programs may wait in the listener's queue.
    knocked: bool,
    visitors: HashMap<u64, Visitor>,
}

impl Door {
    /// Serves a listener, which becomes non-blocking.
    pub(crate) fn new(listener: UnixListener) -> std::io::Result<Self> {
        listener.set_nonblocking(true)?;
        let timer = TimerFd::new().map_err(std::io::Error::from)?;
        Ok(Self { listener, timer, armed: false, knocked: true, visitors: HashMap::new() })
    }

    /// The listener, to wait on (edge-triggered).
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Programs inside that have not said yet what they want.
    pub(crate) fn visitors(&self) -> usize {
        self.visitors.len()
    }

    /// The listener has an event.
    pub(crate) fn knock(&mut self) {
        self.knocked = true;
    }

    /// The next program in the queue, if any.
    pub(crate) fn next(&mut self) -> Option<UnixStream> {
        while self.knocked {
            match self.listener.accept() {
                Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => return Some(stream),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.knocked = false,
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    // Out of descriptors or memory: the queue is tried again when a connection ends or another comes.
                    log::warn!("cannot accept a connection of a host program: {error}");
                    return None;
                }
            }
        }
        None
    }

    /// Lets a program in and waits for its line.
    pub(crate) fn admit(&mut self, id: u64, stream: UnixStream) {
        self.visitors.insert(id, Visitor { stream, since: Instant::now() });
        if !self.armed {
            self.arm(PATIENCE);
        }
    }

    /// A visitor has an event; returns it once it has said which port it wants. `None` also for an unknown id.
    pub(crate) fn advance(&mut self, id: u64, events: u32) -> Option<(UnixStream, u32)> {
        let visitor = self.visitors.get_mut(&id)?;
        // The line cannot become complete any more once the program has finished writing.
        let finished = events & (EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR).bits() != 0;
        match handshake::advance(&mut visitor.stream) {
            Ok(Progress::Port(port)) => self.visitors.remove(&id).map(|visitor| (visitor.stream, port)),
            Ok(Progress::Incomplete) if !finished => None,
            Ok(Progress::Incomplete | Progress::Refused) | Err(_) => {
                self.visitors.remove(&id);
                None
            }
        }
    }

    /// The timer has expired: shows out who was silent for too long.
    pub(crate) fn expire(&mut self, now: Instant) {
        self.armed = false;
        // Also ends the event; unlike a read, this cannot block.
        if let Err(error) = self.timer.clear() {
            log::warn!("cannot clear the handshake timer: {error}");
        }
        self.visitors.retain(|_, visitor| now.duration_since(visitor.since) < PATIENCE);
        if let Some(first) = self.visitors.values().map(|visitor| visitor.since).min() {
            self.arm((PATIENCE - now.duration_since(first)).max(Duration::from_millis(1)));
        }
    }

    fn arm(&mut self, delay: Duration) {
        match self.timer.reset(delay, None) {
            Ok(()) => self.armed = true,
            Err(error) => log::warn!("cannot arm the handshake timer: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_silent_are_shown_out_and_the_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let mut door = Door::new(UnixListener::bind(dir.path().join("s")).unwrap()).unwrap();
        let mut silent = UnixStream::connect(dir.path().join("s")).unwrap();
        let _later = UnixStream::connect(dir.path().join("s")).unwrap();
        for id in 0..2 {
            let stream = door.next().unwrap();
            door.admit(id, stream);
        }
        assert!(door.next().is_none());
        assert!(door.timer.is_armed().unwrap());
        let now = Instant::now();
        door.visitors.get_mut(&0).unwrap().since = now - PATIENCE;
        door.expire(now);
        assert_eq!(door.visitors(), 1);
        assert_eq!(silent.read(&mut [0]).unwrap(), 0);
        assert!(door.timer.is_armed().unwrap(), "for the one that is left");
        door.expire(now + PATIENCE);
        assert_eq!(door.visitors(), 0);
        assert!(!door.timer.is_armed().unwrap());
    }
}
