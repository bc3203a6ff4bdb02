//! Signals to `bulkhead run` and `exec`: forwarded to the container, and the way out when that does not help.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// What a user wants who sends a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A signal for the container.
    Signal(i32),
    /// The terminal has another size.
    Resized,
}

/// The signals of this process. While it exists none of them ends the process.
#[derive(Debug)]
pub(crate) struct Signals {
    hup: Signal,
    int: Signal,
    quit: Signal,
    term: Signal,
    usr1: Signal,
    usr2: Signal,
    winch: Signal,
}

impl Signals {
    /// Takes the signals over.
    pub(crate) fn install() -> io::Result<Signals> {
        Ok(Signals {
            hup: signal(SignalKind::hangup())?,
            int: signal(SignalKind::interrupt())?,
            quit: signal(SignalKind::quit())?,
            term: signal(SignalKind::terminate())?,
            usr1: signal(SignalKind::user_defined1())?,
            usr2: signal(SignalKind::user_defined2())?,
            winch: signal(SignalKind::window_change())?,
        })
    }

    /// The next one. Cancel safe.
    pub(crate) async fn next(&mut self) -> Event {
        tokio::select! {
            _ = self.hup.recv() => Event::Signal(libc::SIGHUP),
            _ = self.int.recv() => Event::Signal(libc::SIGINT),
            _ = self.quit.recv() => Event::Signal(libc::SIGQUIT),
            _ = self.term.recv() => Event::Signal(libc::SIGTERM),
            _ = self.usr1.recv() => Event::Signal(libc::SIGUSR1),
            _ = self.usr2.recv() => Event::Signal(libc::SIGUSR2),
            _ = self.winch.recv() => Event::Resized,
        }
    }

    /// The next one that asks to end. Cancel safe.
    pub(crate) async fn end(&mut self) -> i32 {
        loop {
            if let Event::Signal(signal) = self.next().await
                && ends(signal)
            {
                return signal;
            }
        }
    }
}

fn ends(signal: i32) -> bool {
    matches!(signal, libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM)
}

/// What to do with a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reaction {
    /// Pass it on.
    Forward,
    /// Pass it on, and say how to force the end.
    Warn,
    /// End without the container's consent.
    Force,
}

/// Counts how often the user asked. A container's first process ignores what it has no handler for, so that Ctrl-C alone
/// may do nothing at all.
#[derive(Debug, Default)]
pub(crate) struct Patience {
    asked: u32,
}

impl Patience {
    /// What to do with this signal.
    pub(crate) fn react(&mut self, signal: i32) -> Reaction {
        if !matches!(signal, libc::SIGINT | libc::SIGTERM) {
            return Reaction::Forward;
        }
        self.asked += 1;
        match self.asked {
            1 => Reaction::Forward,
            2 => Reaction::Warn,
            _ => Reaction::Force,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_request_is_an_order() {
        let mut patience = Patience::default();
        let signals = [libc::SIGINT, libc::SIGUSR1, libc::SIGHUP, libc::SIGTERM, libc::SIGINT];
        let reactions = signals.map(|signal| patience.react(signal));
        assert_eq!(
            reactions,
            [Reaction::Forward, Reaction::Forward, Reaction::Forward, Reaction::Warn, Reaction::Force]
        );
    }

    #[test]
    fn what_ends() {
        assert!(ends(libc::SIGTERM) && ends(libc::SIGQUIT) && !ends(libc::SIGUSR1));
    }
}
