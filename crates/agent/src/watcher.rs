//! Keeps copies of trees up to date: those whose file system tells of changes when it does, the rest by looking again.
//!
//! A virtio-fs tells nothing of what the host changes, so there is no event to wait for: one task looks at all such trees
//! every [`EVERY`], and lives as long as there are any. An original that hangs keeps one thread and its own copy, no other.

use std::{
    collections::BTreeMap,
    fmt,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use rustix::fs::inotify::{self, CreateFlags};
use tokio::{io::Interest, runtime::Handle, task::AbortHandle, time::MissedTickBehavior};

use crate::{
    error::{Error, Result},
    mirror::{Mirror, Updated},
    sync::{blocking, lock},
    sys,
};

/// How often an original is looked at that tells nothing.
const EVERY: Duration = Duration::from_secs(2);
/// So many threads at most are left to originals that hang.
const LOOKING: usize = 4;
/// The end of a copy waits this long for the update it meets.
const FAREWELL: Duration = Duration::from_secs(1);

/// All copies.
#[derive(Default)]
pub(crate) struct Watcher {
    table: Mutex<Table>,
    looking: AtomicUsize,
}

#[derive(Default)]
struct Table {
    last: u64,
    copies: BTreeMap<u64, Arc<Copy>>,
    ticking: bool,
}

/// One copy.
struct Copy {
    mirror: Mutex<Mirror>,
    stopped: AtomicBool,
    /// Something has changed that no look has seen yet.
    dirty: AtomicBool,
    /// Nobody tells of changes, or not any more.
    silent: AtomicBool,
    busy: Mutex<bool>,
    idle: Condvar,
    listening: Mutex<Option<AbortHandle>>,
    source: PathBuf,
}

/// A copy that is kept up to date until [`Watched::stop`].
pub(crate) struct Watched {
    watcher: Arc<Watcher>,
    id: u64,
}

impl Watcher {
    /// Makes the copy and keeps it so. Blocks until it is complete; to be called on a blocking thread of the runtime.
    pub(crate) fn keep(
        self: &Arc<Self>,
        mut mirror: Mirror,
        source: PathBuf,
        tells: bool,
    ) -> Result<Watched> {
        let inotify = if tells { listen(&mut mirror) } else { None };
        let what = |source: &PathBuf| format!("copy {}, which is to be watched", source.display());
        match mirror.update(&AtomicBool::new(false)) {
            Ok(Updated::Done) => {}
            Ok(Updated::Again) => {
                return Err(Error::State(format!("{}: it does not stop changing", what(&source))));
            }
            Err(error) => return Err(Error::Io { what: what(&source), source: error }),
        }
        let copy = Arc::new(Copy {
            mirror: Mutex::new(mirror),
            stopped: AtomicBool::new(false),
            dirty: AtomicBool::new(false),
            silent: AtomicBool::new(inotify.is_none()),
            busy: Mutex::new(false),
            idle: Condvar::new(),
            listening: Mutex::new(None),
            source,
        });
        let id = {
            let mut table = lock(&self.table);
            table.last += 1;
            let id = table.last;
            table.copies.insert(id, Arc::clone(&copy));
            id
        };
        match inotify {
            Some(inotify) => {
                let task = Handle::current().spawn(Arc::clone(self).hear(Arc::clone(&copy), inotify));
                *lock(&copy.listening) = Some(task.abort_handle());
            }
            None => self.tick(),
        }
        Ok(Watched { watcher: Arc::clone(self), id })
    }

    /// Has the task run that looks at the silent ones.
    fn tick(self: &Arc<Self>) {
        if !std::mem::replace(&mut lock(&self.table).ticking, true) {
            Handle::current().spawn(Arc::clone(self).look_again_and_again());
        }
    }

    async fn look_again_and_again(self: Arc<Self>) {
        let mut interval = tokio::time::interval(EVERY);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let copies: Vec<_> = {
                let mut table = lock(&self.table);
                let silent = table.copies.values().filter(|copy| copy.silent.load(Ordering::Relaxed));
                let copies: Vec<_> = silent.cloned().collect();
                if copies.is_empty() {
                    table.ticking = false;
                    return;
                }
                copies
            };
            if self.looking.load(Ordering::Relaxed) >= LOOKING {
                continue;
            }
            self.looking.fetch_add(1, Ordering::Relaxed);
            let watcher = Arc::clone(&self);
            // Not waited for: if one hangs, the next round passes it by.
            crate::sync::spawn_blocking(move || {
                for copy in copies {
                    copy.dirty.store(true, Ordering::Relaxed);
                    copy.update();
                }
                watcher.looking.fetch_sub(1, Ordering::Relaxed);
            });
        }
    }

    /// Updates a copy whenever its original tells of a change.
    async fn hear(self: Arc<Self>, copy: Arc<Copy>, inotify: OwnedFd) {
        let Ok(inotify) = sys::watch(inotify, Interest::READABLE) else {
            copy.silent.store(true, Ordering::Relaxed);
            return self.tick();
        };
        loop {
            let Ok(mut ready) = inotify.readable().await else { return };
            let mut events = [0; 4096];
            // What changed is found by looking; that something did is enough.
            while matches!(rustix::io::read(inotify.get_ref(), &mut events), Ok(1..)) {}
            ready.clear_ready();
            copy.dirty.store(true, Ordering::Relaxed);
            let updating = Arc::clone(&copy);
            let update = move || {
                updating.update();
                Ok(())
            };
            // A lost task is a copy that nobody updates; the other way is left to it.
            if blocking(update).await.is_err() {
                copy.silent.store(true, Ordering::Relaxed);
            }
            if copy.silent.load(Ordering::Relaxed) {
                return self.tick();
            }
        }
    }
}

/// Asks the kernel for the changes of an original; a system without any to give is no error.
fn listen(mirror: &mut Mirror) -> Option<OwnedFd> {
    let inotify = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).ok()?;
    mirror.tell(inotify.try_clone().ok()?);
    Some(inotify)
}

impl Copy {
    /// Looks until nothing has changed since; who finds it being done leaves it to that one.
    fn update(&self) {
        while self.dirty.load(Ordering::Relaxed) && self.claim() {
            self.dirty.store(false, Ordering::Relaxed);
            let updated = lock(&self.mirror).update(&self.stopped);
            if let Err(error) = updated {
                tracing::warn!(source = %self.source.display(), %error, "a watched volume keeps its old content");
                // What tells of changes may be gone with what it told of.
                self.silent.store(true, Ordering::Relaxed);
            } else if matches!(updated, Ok(Updated::Again)) {
                self.silent.store(true, Ordering::Relaxed);
            }
            *lock(&self.busy) = false;
            self.idle.notify_all();
        }
    }

    fn claim(&self) -> bool {
        let mut busy = lock(&self.busy);
        !self.stopped.load(Ordering::Relaxed) && !std::mem::replace(&mut *busy, true)
    }
}

impl Watched {
    /// Ends the updates. One that hangs is left behind, and changes nothing any more. Blocks, but not for long.
    pub(crate) fn stop(&self) {
        let Some(copy) = lock(&self.watcher.table).copies.remove(&self.id) else { return };
        copy.stopped.store(true, Ordering::Relaxed);
        if let Some(listening) = lock(&copy.listening).take() {
            listening.abort();
        }
        let busy = lock(&copy.busy);
        drop(copy.idle.wait_timeout_while(busy, FAREWELL, |busy| *busy));
    }
}

impl PartialEq for Watched {
    fn eq(&self, other: &Watched) -> bool {
        Arc::ptr_eq(&self.watcher, &other.watcher) && self.id == other.id
    }
}

impl fmt::Debug for Watched {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Watched({})", self.id)
    }
}
