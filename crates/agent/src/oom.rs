//! Tells of containers whose processes the kernel killed for want of memory.
//!
//! The kernel touches `memory.events` of a cgroup at each such event, and one inotify descriptor watches those of all
//! containers. Only a rise of `oom_kill` counts.

use std::{
    collections::{HashMap, VecDeque},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::Notify,
};

use crate::{
    error::{During, Result},
    sync::lock,
    sys,
};

/// So many events wait for somebody to ask; the oldest go first.
const QUEUE: usize = 100;

/// Watches containers, and keeps what happened until somebody asks.
#[derive(Default)]
pub(crate) struct OomWatcher {
    state: Mutex<State>,
    happened: Notify,
}

#[derive(Default)]
struct State {
    /// Made with the first container that has a cgroup.
    inotify: Option<Arc<AsyncFd<OwnedFd>>>,
    watched: HashMap<i32, Watched>,
    events: VecDeque<String>,
    closed: bool,
}

struct Watched {
    container: String,
    file: PathBuf,
    kills: u64,
}

impl State {
    fn watch_of(&self, container: &str) -> Option<i32> {
        self.watched.iter().find_map(|(watch, w)| (w.container == container).then_some(*watch))
    }
}

impl OomWatcher {
    /// Watches a container's `memory.events` until that file is gone; again is no error. Has to be called on the runtime.
    pub(crate) fn watch(self: &Arc<Self>, container: &str, file: PathBuf) -> Result<()> {
        let what = || format!("watch {} for lack of memory", file.display());
        let kills = kills(&file).during(what)?;
        let mut state = lock(&self.state);
        if state.watched.values().any(|watched| watched.container == container) {
            return Ok(());
        }
        let inotify = match &state.inotify {
            Some(inotify) => Arc::clone(inotify),
            None => {
                let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).during(what)?;
                let inotify = Arc::new(sys::watch(fd, Interest::READABLE).during(what)?);
                crate::sync::spawn(Arc::clone(self).run(Arc::clone(&inotify)));
                state.inotify.insert(inotify).clone()
            }
        };
        let watch = inotify::add_watch(inotify.get_ref(), &file, WatchFlags::MODIFY).during(what)?;
        state.watched.insert(watch, Watched { container: container.to_owned(), file, kills });
        Ok(())
    }

    /// Looks without having been told to, as before the cgroup goes and takes the figure with it.
    pub(crate) fn look_at(&self, container: &str) {
        let mut state = lock(&self.state);
        if let Some(watch) = state.watch_of(container) {
            self.look(&mut state, watch);
        }
    }

    /// Forgets a container that is gone.
    pub(crate) fn unwatch(&self, container: &str) {
        let mut state = lock(&self.state);
        if let Some(watch) = state.watch_of(container) {
            state.watched.remove(&watch);
        }
    }

    /// The container that lacked memory next; `None` once the sandbox is gone.
    pub(crate) async fn next(&self) -> Option<String> {
        loop {
            let happened = self.happened.notified();
            {
                let mut state = lock(&self.state);
                if let Some(container) = state.events.pop_front() {
                    if !state.events.is_empty() {
                        self.happened.notify_one();
                    }
                    return Some(container);
                }
                if state.closed {
                    return None;
                }
            }
            happened.await;
        }
    }

    /// Ends the wait of everybody who asks.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.happened.notify_waiters();
    }

    async fn run(self: Arc<Self>, inotify: Arc<AsyncFd<OwnedFd>>) {
        loop {
            let Ok(mut ready) = inotify.readable().await else { return };
            if let Ok(Err(error)) = ready.try_io(|fd| self.drain(fd.get_ref())) {
                tracing::error!(%error, "no more events for lack of memory");
                return;
            }
        }
    }

    /// Takes every event that is there; would-block when none is left.
    fn drain(&self, inotify: &OwnedFd) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 1024];
        let mut events = inotify::Reader::new(inotify, &mut buffer);
        loop {
            let event = match events.next() {
                Err(Errno::INTR) => continue,
                event => event?,
            };
            let mut state = lock(&self.state);
            self.look(&mut state, event.wd());
            if event.events().contains(ReadFlags::IGNORED) {
                state.watched.remove(&event.wd());
            }
        }
    }

    fn look(&self, state: &mut State, watch: i32) {
        let Some(watched) = state.watched.get_mut(&watch) else { return };
        let Ok(kills) = kills(&watched.file) else { return };
        if kills > watched.kills {
            watched.kills = kills;
            let container = watched.container.clone();
            if state.events.len() == QUEUE {
                state.events.pop_front();
            }
            state.events.push_back(container);
            self.happened.notify_one();
        }
    }
}

fn kills(memory_events: &Path) -> io::Result<u64> {
    Ok(count(&std::fs::read_to_string(memory_events)?))
}

fn count(memory_events: &str) -> u64 {
    let value = memory_events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}

#[cfg(any(test, fuzzing))]
/// Counters of anybody.
pub(crate) fn fuzz(text: &str) {
    count(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(kills: u64) -> String {
        format!("low 0\nhigh 0\nmax 12\noom 3\noom_kill {kills}\noom_group_kill 9\n")
    }

    #[test]
    fn only_kills_count() {
        assert_eq!(count(&events(4)), 4);
        assert_eq!(count("low 0\n"), 0);
    }

    #[tokio::test]
    async fn each_rise_is_told_once_to_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("memory.events");
        std::fs::write(&file, events(1)).unwrap();
        let watcher = Arc::new(OomWatcher::default());
        watcher.watch("c", file.clone()).unwrap();
        std::fs::write(&file, events(2)).unwrap();
        assert_eq!(watcher.next().await.as_deref(), Some("c"));
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), watcher.next()).await.is_err());
    }

    #[tokio::test]
    async fn watching_again_loses_nothing_and_the_queue_is_bounded() {
        let directory = tempfile::tempdir().unwrap();
        let watcher = Arc::new(OomWatcher::default());
        let file = |n: usize| directory.path().join(n.to_string());
        for n in 0..=QUEUE {
            std::fs::write(file(n), events(0)).unwrap();
            watcher.watch(&n.to_string(), file(n)).unwrap();
        }
        for n in 0..=QUEUE {
            std::fs::write(file(n), events(1)).unwrap();
            watcher.watch(&n.to_string(), file(n)).unwrap();
            watcher.look_at(&n.to_string());
        }
        // The oldest has gone.
        for n in 1..=QUEUE {
            assert_eq!(watcher.next().await, Some(n.to_string()));
        }
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), watcher.next()).await.is_err());
    }

    #[tokio::test]
    async fn the_last_look_sees_what_no_event_told() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("memory.events");
        std::fs::write(&file, events(0)).unwrap();
        let watcher = Arc::new(OomWatcher::default());
        watcher.watch("c", file.clone()).unwrap();
        std::fs::write(&file, events(1)).unwrap();
        watcher.look_at("c");
        assert_eq!(watcher.next().await.as_deref(), Some("c"));
        // It was not removed after all.
        std::fs::write(&file, events(2)).unwrap();
        assert_eq!(watcher.next().await.as_deref(), Some("c"));
        watcher.unwatch("c");
        std::fs::write(&file, events(3)).unwrap();
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), watcher.next()).await.is_err());
        watcher.close();
        assert_eq!(watcher.next().await, None);
    }
}
