//! Between a user and a running process: signals and window sizes go in, the end comes out.
//!
//! Shared by `run`, whose process is a container's init, and `exec`.

use std::sync::Arc;

use anyhow::{Result, anyhow};
use bulkhead_sandbox::Container;
use tokio::sync::mpsc;

use crate::{
    failure,
    signals::{Event, Patience, Reaction, Signals},
    streams::{self, Health},
    tty,
};

/// A process that can be talked to.
pub(crate) trait Partner: Clone + Send + Sync + 'static {
    /// Sends a signal; `all` means everything that runs beside the process as well.
    fn signal(&self, signal: u32, all: bool) -> impl Future<Output = Result<()>> + Send;
    /// Sets its terminal's size.
    fn resize(&self, rows: u16, columns: u16) -> impl Future<Output = Result<()>> + Send;
    /// Resolves with its exit code once it has ended and its output is on its way.
    fn wait(&self) -> impl Future<Output = Result<i32>> + Send;
}

/// How a conversation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The process ended by itself, or by a signal that was passed on.
    Exited(i32),
    /// The user did not want to wait any longer.
    Forced,
}

enum Order {
    Signal { signal: u32, all: bool },
    Resize,
}

/// Talks until the process ends or the user insists.
pub(crate) async fn hold<P: Partner>(
    partner: &P,
    terminal: bool,
    signals: &mut Signals,
    health: &Health,
) -> Result<End> {
    let (orders, inbox) = mpsc::unbounded_channel();
    // A task of its own, in order: a guest that does not answer must not keep us from hearing the user.
    let courier = tokio::spawn(carry(partner.clone(), inbox));
    let end = listen(partner, terminal, signals, health, &orders).await;
    courier.abort();
    end
}

async fn listen<P: Partner>(
    partner: &P,
    terminal: bool,
    signals: &mut Signals,
    health: &Health,
    orders: &mpsc::UnboundedSender<Order>,
) -> Result<End> {
    let mut patience = Patience::default();
    let mut deaf = false;
    let wait = partner.wait();
    tokio::pin!(wait);
    loop {
        let event = tokio::select! {
            code = &mut wait => return Ok(End::Exited(code?)),
            () = health.failed(), if !deaf => {
                // Like a program whose reader has gone: nobody wants the rest.
                deaf = true;
                let _ = orders.send(Order::Signal { signal: SIGKILL, all: true });
                continue;
            }
            event = signals.next() => event,
        };
        match event {
            Event::Resized if terminal => drop(orders.send(Order::Resize)),
            Event::Resized => {}
            Event::Signal(signal) => {
                match patience.react(signal) {
                    Reaction::Forward => {}
                    Reaction::Warn => streams::say("bulkhead: still running; once more forces the end"),
                    Reaction::Force => return Ok(End::Forced),
                }
                let _ = orders.send(Order::Signal { signal: signal.unsigned_abs(), all: false });
            }
        }
    }
}

const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();

async fn carry<P: Partner>(partner: P, mut inbox: mpsc::UnboundedReceiver<Order>) {
    while let Some(order) = inbox.recv().await {
        let carried = match order {
            Order::Signal { signal, all } => partner.signal(signal, all).await,
            Order::Resize => match tty::size() {
                Some((rows, columns)) => partner.resize(rows, columns).await,
                None => Ok(()),
            },
        };
        // The process may have ended meanwhile, and then its end is on the way.
        if let Err(error) = carried {
            tracing::debug!("{error:#}");
        }
    }
}

/// The exit code that stands for an end.
pub(crate) fn code(end: &End, health: &Health) -> u8 {
    match end {
        _ if health.reader_is_gone() => failure::signalled(libc::SIGPIPE),
        End::Exited(code) => u8::try_from(*code).unwrap_or(u8::MAX),
        End::Forced => failure::signalled(libc::SIGKILL),
    }
}

/// Why the output is incomplete, when that is worth an error.
pub(crate) fn output_failure(health: &Health) -> Option<anyhow::Error> {
    let (name, error) = health.failure()?;
    (!health.reader_is_gone()).then(|| anyhow!("write to {name}: {error}; the container was ended"))
}

/// The first process of a container of ours.
#[derive(Clone, Debug)]
pub(crate) struct Init(pub(crate) Arc<Container>);

impl Partner for Init {
    async fn signal(&self, signal: u32, all: bool) -> Result<()> {
        Ok(self.0.kill("", signal, all).await?)
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        Ok(self.0.resize("", rows.into(), columns.into()).await?)
    }

    async fn wait(&self) -> Result<i32> {
        Ok(self.0.wait("").await?.code)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::sync::Notify;

    use super::*;

    /// Ends when it gets a fatal signal.
    #[derive(Clone, Default)]
    struct Fake {
        heard: Arc<Mutex<Vec<(u32, bool)>>>,
        end: Arc<Notify>,
    }

    impl Partner for Fake {
        async fn signal(&self, signal: u32, all: bool) -> Result<()> {
            self.heard.lock().unwrap().push((signal, all));
            if signal == SIGKILL {
                self.end.notify_one();
            }
            Ok(())
        }
        async fn resize(&self, _: u16, _: u16) -> Result<()> {
            Ok(())
        }
        async fn wait(&self) -> Result<i32> {
            self.end.notified().await;
            Ok(137)
        }
    }

    #[test]
    fn signals_are_passed_on_and_the_third_ends() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut signals = Signals::install().unwrap();
            let (fake, health) = (Fake::default(), Health::default());
            let sender = async {
                for _ in 0..3 {
                    let heard = fake.heard.lock().unwrap().len();
                    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::USR1)
                        .unwrap();
                    while fake.heard.lock().unwrap().len() == heard {
                        tokio::task::yield_now().await;
                    }
                }
                fake.end.notify_one();
            };
            let (end, ()) = tokio::join!(hold(&fake, false, &mut signals, &health), sender);
            assert_eq!(end.unwrap(), End::Exited(137));
            let usr1 = libc::SIGUSR1.unsigned_abs();
            assert_eq!(*fake.heard.lock().unwrap(), [(usr1, false); 3]);
        });
    }

    #[test]
    fn codes() {
        let health = Health::default();
        assert_eq!(code(&End::Exited(3), &health), 3);
        assert_eq!(code(&End::Exited(-1), &health), 255);
        assert_eq!(code(&End::Forced, &health), 137);
        assert!(output_failure(&health).is_none());
    }
}
