//! The only caller of `wait*`: collects every child and hands each exit to whoever owns the process.
//!
//! A process can end before the code that spawned it could claim its pid. So while a spawn is in flight (a [`Spawning`]
//! guard is alive) the exits of pids that nobody claimed are kept, and a claim made with the guard finds them. Exits older
//! than every guard can belong to no coming claim and are dropped, which bounds the memory.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    os::fd::BorrowedFd,
    sync::{Arc, Mutex},
};

use rustix::process::{WaitId, WaitIdOptions, WaitOptions, WaitStatus};
use tokio::signal::unix::Signal;

use crate::sync::lock;

/// What is done with a process' exit code; runs on the reaper's task and must not block.
pub(crate) type OnExit = Box<dyn FnOnce(i32) + Send>;

/// The table of processes whose exits are awaited.
#[derive(Default)]
pub(crate) struct Reaper {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// Orders guards and exits.
    clock: u64,
    /// When the spawns that are in flight began.
    spawning: BTreeSet<u64>,
    /// Exits that nobody has claimed, by pid: when, and the code.
    unclaimed: HashMap<i32, (u64, i32)>,
    /// Processes whose exits are awaited, by pid.
    claimed: HashMap<i32, OnExit>,
}

/// A spawn in flight: while it lives, no exit is forgotten. Taken before the spawn, and the only way to claim a pid.
pub(crate) struct Spawning {
    reaper: Arc<Reaper>,
    since: u64,
}

impl Reaper {
    /// Announces a spawn.
    pub(crate) fn spawning(self: &Arc<Self>) -> Spawning {
        Spawning { reaper: Arc::clone(self), since: lock(&self.table).begin() }
    }

    /// Reaps now, and again whenever a child ends; never returns while the signal stream lives.
    pub(crate) async fn run(&self, mut child: Signal) {
        loop {
            self.reap();
            if child.recv().await.is_none() {
                return;
            }
        }
    }

    /// Acts as if a child had ended.
    #[cfg(test)]
    pub(crate) fn pretend(&self, pid: i32, code: i32) {
        let on_exit = lock(&self.table).reaped(pid, code);
        on_exit.expect("it was claimed")(code);
    }

    fn reap(&self) {
        // `__WALL` also collects children that were cloned with another exit signal than SIGCHLD.
        let options = WaitOptions::NOHANG | WaitOptions::from_bits_retain(libc::__WALL.cast_unsigned());
        while let Ok(Some((pid, status))) = rustix::process::wait(options) {
            if let Some(code) = exit_code(status) {
                let on_exit = lock(&self.table).reaped(pid.as_raw_nonzero().get(), code);
                if let Some(on_exit) = on_exit {
                    on_exit(code);
                }
            }
        }
    }
}

impl Spawning {
    /// Asks to be told the exit of a process that was spawned under this guard; at once when it is over already.
    pub(crate) fn claim(&self, pid: i32, pidfd: BorrowedFd<'_>, on_exit: OnExit) {
        let exited = {
            let mut table = lock(&self.reaper.table);
            // Under the lock: one that is reaped after the look is handed over after the claim.
            let reaped = is_reaped(pidfd);
            table.claim(pid, reaped, on_exit)
        };
        if let Some((on_exit, code)) = exited {
            on_exit(code);
        }
    }
}

impl Spawning {
    /// As [`Spawning::claim`] for a process that is known to have been reaped.
    pub(crate) fn claim_reaped(&self, pid: i32, on_exit: OnExit) {
        let exited = lock(&self.reaper.table).claim(pid, true, on_exit);
        if let Some((on_exit, code)) = exited {
            on_exit(code);
        }
    }
}

impl Drop for Spawning {
    fn drop(&mut self) {
        lock(&self.reaper.table).end(self.since);
    }
}

impl Table {
    fn begin(&mut self) -> u64 {
        self.clock += 1;
        self.spawning.insert(self.clock);
        self.clock
    }

    fn end(&mut self, since: u64) {
        self.spawning.remove(&since);
        match self.spawning.first() {
            Some(&oldest) => self.unclaimed.retain(|_, (when, _)| *when > oldest),
            None => self.unclaimed = HashMap::new(),
        }
    }

    fn reaped(&mut self, pid: i32, code: i32) -> Option<OnExit> {
        if let Some(on_exit) = self.claimed.remove(&pid) {
            return Some(on_exit);
        }
        if !self.spawning.is_empty() {
            self.clock += 1;
            self.unclaimed.insert(pid, (self.clock, code));
        }
        None
    }

    /// `reaped` says that the process is gone: only then is a kept exit of its pid its own, and not that of an earlier
    /// process with the same number.
    fn claim(&mut self, pid: i32, reaped: bool, on_exit: OnExit) -> Option<(OnExit, i32)> {
        if let Some((_, code)) = self.unclaimed.remove(&pid)
            && reaped
        {
            return Some((on_exit, code));
        }
        self.claimed.insert(pid, on_exit);
        None
    }
}

/// Whether the process has been collected. Looks without collecting.
fn is_reaped(pidfd: BorrowedFd<'_>) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::PidFd(pidfd), options)
        .is_err_and(|errno| errno == rustix::io::Errno::CHILD)
}

/// The exit code in a shell's terms: 128 + the signal for a process that was killed by one.
fn exit_code(status: WaitStatus) -> Option<i32> {
    status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal))
}

/// Makes orphaned descendants children of this process, as they are for PID 1 anyway.
pub(crate) fn adopt_orphans() -> io::Result<()> {
    // The argument is only looked at as a flag.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ignore() -> OnExit {
        Box::new(|_| {})
    }

    #[test]
    fn an_exit_before_the_claim_is_not_lost() {
        let mut table = Table::default();
        let spawn = table.begin();
        assert!(table.reaped(10, 3).is_none());
        let (_, code) = table.claim(10, true, ignore()).expect("the exit was kept");
        assert_eq!(code, 3);
        table.end(spawn);
    }

    #[test]
    fn an_exit_after_the_claim_is_delivered() {
        let mut table = Table::default();
        let spawn = table.begin();
        assert!(table.claim(10, false, ignore()).is_none());
        table.end(spawn);
        assert!(table.reaped(10, 3).is_some());
        assert!(table.reaped(10, 3).is_none(), "delivered once");
    }

    #[test]
    fn a_stale_exit_is_not_taken_for_a_running_process() {
        let mut table = Table::default();
        let spawn = table.begin();
        table.reaped(10, 3);
        assert!(table.claim(10, false, ignore()).is_none());
        table.end(spawn);
        assert!(table.reaped(10, 4).is_some());
    }

    #[test]
    fn what_no_claim_can_want_is_forgotten() {
        let mut table = Table::default();
        table.reaped(1, 0);
        assert!(table.unclaimed.is_empty(), "nothing is kept without a spawn");

        let first = table.begin();
        table.reaped(2, 0);
        let second = table.begin();
        table.reaped(3, 0);
        table.end(first);
        assert_eq!(table.unclaimed.keys().copied().collect::<Vec<_>>(), [3]);
        table.end(second);
        assert!(table.unclaimed.is_empty());
    }

    // It reaps every child of the test's process, so no other unit test may have one.
    #[tokio::test]
    #[allow(clippy::zombie_processes, reason = "the reaper waits for it")]
    async fn real_children_are_reaped_once_and_told() {
        let reaper = Arc::new(Reaper::default());
        let child = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::child()).unwrap();
        let spawning = reaper.spawning();
        let process = std::process::Command::new("/bin/sh").args(["-c", "exit 7"]).spawn().unwrap();
        let pid = i32::try_from(process.id()).unwrap();
        let pidfd = rustix::process::pidfd_open(
            rustix::process::Pid::from_raw(pid).unwrap(),
            rustix::process::PidfdFlags::empty(),
        )
        .unwrap();
        let (sender, receiver) = tokio::sync::oneshot::channel();
        spawning.claim(
            pid,
            std::os::fd::AsFd::as_fd(&pidfd),
            Box::new(move |code| sender.send(code).unwrap()),
        );
        drop(spawning);
        let running = Arc::clone(&reaper);
        let task = tokio::spawn(async move { running.run(child).await });
        assert_eq!(receiver.await.unwrap(), 7);
        task.abort();
    }
}
