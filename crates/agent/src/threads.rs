//! Threads for work that blocks: made for work that is there, kept for a moment, and never counted on.
//!
//! ```text
//! work ─► idle thread?  ──no──► a further one can be made? ──no──► waits for the first of:
//!                                                                  a thread that is done, the one in reserve, one made later
//! ```
//! A container with a fork bomb takes every thread that the guest has. The runtime's own pool panics then, and that is the
//! end of the guest. The one in reserve is made at the start and does nothing else, so that such a container can still be
//! removed.
//!
//! A pool belongs to the thread that first asked for it (the runtime's), and to those that it made.

use std::{
    cell::OnceCell,
    collections::VecDeque,
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

use tokio::runtime::Handle;

use crate::sync::lock;

/// Each owner of work that can hang has a bound of its own, so that what hangs in many leaves enough for the next.
const MOST: usize = 2048;
/// An idle thread ends after this long.
const IDLE: Duration = Duration::from_secs(1);
/// After this long it is tried again to make a thread: nothing tells when one can be made.
const AGAIN: Duration = Duration::from_secs(1);

thread_local! {
    static POOL: OnceCell<Arc<Pool>> = const { OnceCell::new() };
}

/// Hands over work that blocks. It may call what needs the runtime.
pub(crate) fn start(work: Box<dyn FnOnce() + Send>) {
    current().start(Work { what: work, runtime: Handle::try_current().ok() });
}

/// Makes the thread in reserve. Once, on the runtime's thread.
pub(crate) fn reserve() -> io::Result<()> {
    current().make(Pool::stand_by)
}

fn current() -> Arc<Pool> {
    POOL.with(|pool| Arc::clone(pool.get_or_init(Arc::default)))
}

struct Work {
    what: Box<dyn FnOnce() + Send>,
    runtime: Option<Handle>,
}

impl Work {
    fn run(self) {
        let _entered = self.runtime.as_ref().map(Handle::enter);
        (self.what)();
    }
}

struct Pool {
    state: Mutex<State>,
    more: Condvar,
    starved: Condvar,
    spawn: fn(Box<dyn FnOnce() + Send>) -> io::Result<()>,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Work>,
    /// Threads but the one in reserve.
    threads: usize,
    idle: usize,
    /// Something waits for which no thread could be made.
    starved: bool,
}

impl State {
    fn take(&mut self) -> Option<Work> {
        let work = self.waiting.pop_front();
        self.starved &= !self.waiting.is_empty();
        work
    }
}

impl Default for Pool {
    fn default() -> Pool {
        let spawn = |body| std::thread::Builder::new().spawn(body).map(drop);
        Pool { state: Mutex::default(), more: Condvar::new(), starved: Condvar::new(), spawn }
    }
}

impl Pool {
    fn start(self: &Arc<Self>, work: Work) {
        {
            let mut state = lock(&self.state);
            state.waiting.push_back(work);
            if state.idle >= state.waiting.len() {
                return self.more.notify_one();
            }
        }
        if !self.grow() {
            self.starve();
        }
    }

    /// Makes a further thread, if that is possible.
    fn grow(self: &Arc<Self>) -> bool {
        {
            let mut state = lock(&self.state);
            if state.threads >= MOST {
                return false;
            }
            state.threads += 1;
        }
        let made = self.make(Pool::work);
        if made.is_err() {
            lock(&self.state).threads -= 1;
        }
        made.is_ok()
    }

    fn make(self: &Arc<Self>, body: fn(&Pool)) -> io::Result<()> {
        let pool = Arc::clone(self);
        (self.spawn)(Box::new(move || POOL.with(|own| body(own.get_or_init(|| pool)))))
    }

    /// Wakes the thread in reserve, and tries again for as long as something waits: that one's work can hang, too.
    fn starve(self: &Arc<Self>) {
        {
            let mut state = lock(&self.state);
            if state.waiting.is_empty() {
                return;
            }
            self.starved.notify_one();
            if std::mem::replace(&mut state.starved, true) {
                return;
            }
        }
        tracing::warn!("no thread can be made: requests have to wait");
        if Handle::try_current().is_ok() {
            let pool = Arc::clone(self);
            crate::sync::spawn(async move {
                while lock(&pool.state).starved {
                    tokio::time::sleep(AGAIN).await;
                    pool.grow();
                }
            });
        }
    }

    /// The life of a thread.
    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if let Some(work) = state.take() {
                drop(state);
                work.run();
                state = lock(&self.state);
                continue;
            }
            state.idle += 1;
            let waited = self.more.wait_timeout_while(state, IDLE, |state| state.waiting.is_empty());
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.idle -= 1;
            if state.waiting.is_empty() {
                state.threads -= 1;
                return;
            }
        }
    }

    /// That of the thread in reserve.
    fn stand_by(&self) {
        loop {
            let waited = self.starved.wait_while(lock(&self.state), |state| !state.starved);
            if let Some(work) = waited.unwrap_or_else(PoisonError::into_inner).take() {
                work.run();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        atomic::{AtomicBool, Ordering},
        mpsc,
    };

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(30);

    fn pool(spawn: fn(Box<dyn FnOnce() + Send>) -> io::Result<()>) -> Arc<Pool> {
        Arc::new(Pool { spawn, ..Pool::default() })
    }

    fn start(pool: &Arc<Pool>, work: impl FnOnce() + Send + 'static) {
        pool.start(Work { what: Box::new(work), runtime: None });
    }

    #[test]
    fn without_a_thread_to_be_made_the_one_in_reserve_does_the_work_one_after_the_other() {
        let pool = pool(|_| Err(io::Error::from_raw_os_error(libc::EAGAIN)));
        let (done, result) = mpsc::channel();
        for n in 0..3 {
            let done = done.clone();
            start(&pool, move || done.send(n).unwrap());
        }
        assert!(result.try_recv().is_err(), "there is nobody to do it");
        let reserve = Arc::clone(&pool);
        std::thread::spawn(move || reserve.stand_by());
        for n in 0..3 {
            assert_eq!(result.recv_timeout(PATIENCE), Ok(n));
        }
        assert!(!lock(&pool.state).starved);
        assert_eq!(lock(&pool.state).threads, 0);
    }

    #[tokio::test]
    async fn what_waits_gets_a_thread_once_one_can_be_made() {
        static SHORT: AtomicBool = AtomicBool::new(true);
        let pool = pool(|body| match SHORT.load(Ordering::Relaxed) {
            true => Err(io::Error::from_raw_os_error(libc::EAGAIN)),
            false => std::thread::Builder::new().spawn(body).map(drop),
        });
        let (done, result) = tokio::sync::oneshot::channel();
        start(&pool, move || done.send(()).unwrap());
        SHORT.store(false, Ordering::Relaxed);
        tokio::time::timeout(PATIENCE, result).await.expect("nobody has done it").unwrap();
        assert!(!lock(&pool.state).starved);
    }

    #[test]
    fn an_idle_thread_is_used_again_and_hung_ones_keep_nobody_waiting() {
        let pool = Arc::<Pool>::default();
        let (done, result) = mpsc::channel();
        let (release, hang) = mpsc::channel::<()>();
        start(&pool, move || assert!(hang.recv().is_err()));
        for _ in 0..20 {
            let done = done.clone();
            start(&pool, move || done.send(std::thread::current().id()).unwrap());
            result.recv_timeout(PATIENCE).unwrap();
            // It is idle once it says so.
            while lock(&pool.state).idle == 0 {
                std::thread::yield_now();
            }
        }
        assert_eq!(lock(&pool.state).threads, 2);
        drop(release);
        // And none stays.
        let start = std::time::Instant::now();
        while lock(&pool.state).threads > 0 {
            assert!(start.elapsed() < PATIENCE);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn there_are_never_more_than_so_many() {
        let pool = pool(|_| Ok(()));
        (0..=MOST).for_each(|_| start(&pool, || ()));
        assert_eq!(lock(&pool.state).threads, MOST);
        assert!(lock(&pool.state).starved);
    }

    #[tokio::test]
    async fn work_and_what_it_starts_may_use_the_runtime() {
        let (done, result) = tokio::sync::oneshot::channel();
        super::start(Box::new(move || {
            super::start(Box::new(move || done.send(Handle::try_current().is_ok()).unwrap()));
        }));
        assert!(result.await.unwrap());
    }
}
