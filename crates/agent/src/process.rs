//! One process of a container: its streams, and its exit for whoever asks, before or after the fact.

use std::{os::fd::AsFd, os::fd::OwnedFd, sync::Arc};

use rustix::io::Errno;
use tokio::sync::watch;

use crate::{
    error::{During, Error, Result},
    reaper::{OnExit, Spawning},
    stream::{Exit, Streams},
    sys,
};

/// A process that was started in a container and whose exit the reaper reports.
pub(crate) struct Process {
    pid: i32,
    pidfd: OwnedFd,
    exit: watch::Sender<Option<i32>>,
    /// Its output is on the way to where it was asked for.
    copying: watch::Sender<bool>,
    /// Its standard streams.
    pub(crate) streams: Streams,
}

impl Process {
    /// Takes over a process that was spawned under `spawning`; one that cannot be is killed. `on_exit` runs once its exit is
    /// known to all who wait.
    pub(crate) fn adopt(
        process: bulkhead_executor::Process,
        pipe_size: usize,
        spawning: &Spawning,
        on_exit: OnExit,
    ) -> Result<Arc<Process>> {
        let pid = process.pid;
        let streams = Streams::new(process.streams, pipe_size).inspect_err(|_| {
            // The only failure is that it is gone already.
            let _ = sys::pidfd_send_signal(process.pidfd.as_fd(), libc::SIGKILL);
        });
        let streams = streams.during(|| format!("watch the streams of process {pid}"))?;
        let (exit, copying) = (watch::Sender::new(None), watch::Sender::new(false));
        let process = Arc::new(Process { pid, pidfd: process.pidfd, exit, copying, streams });
        let exiting = Arc::clone(&process);
        let announce = move |code| {
            exiting.exit.send_replace(Some(code));
            exiting.streams.stdin.abandon();
            on_exit(code);
        };
        spawning.claim(pid, process.pidfd.as_fd(), Box::new(announce));
        Ok(process)
    }

    /// Its exit code, once it has ended.
    pub(crate) fn exit_code(&self) -> Option<i32> {
        *self.exit.borrow()
    }

    /// Its exit, to be waited for.
    pub(crate) fn exit(&self) -> Exit {
        self.exit.subscribe()
    }

    /// Waits for its end, and for its output to be where it was asked for. Any number of callers, at any time.
    pub(crate) async fn wait(&self) -> i32 {
        let code = self.ended().await;
        self.copied().await;
        code
    }

    /// Announces that the output is being copied.
    pub(crate) fn copy_begins(&self) {
        self.copying.send_replace(true);
    }

    /// Announces that the output was copied, or lets whoever copies it give up.
    pub(crate) fn copy_ends(&self) {
        self.copying.send_replace(false);
    }

    /// Waits until no output is being copied.
    pub(crate) async fn copied(&self) {
        // The sender lives as long as `self`.
        let _ = self.copying.subscribe().wait_for(|copying| !copying).await;
    }

    /// Waits for its end alone.
    pub(crate) async fn ended(&self) -> i32 {
        let mut exit = self.exit();
        // The sender lives as long as `self`, so there always is a code in the end.
        exit.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(255)
    }

    /// Kills its process group, which it leads.
    pub(crate) fn kill_group(&self) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid)
            && self.exit_code().is_none()
        {
            // ESRCH: it has ended meanwhile.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
    }

    /// Sends a signal. One that comes too late is no error: what it was meant for has happened.
    pub(crate) fn signal(&self, signal: i32) -> Result<()> {
        match sys::pidfd_send_signal(self.pidfd.as_fd(), signal) {
            Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => Ok(()),
            Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                Err(Error::Invalid(format!("{signal} is not a signal")))
            }
            sent => sent.during(|| format!("send signal {signal} to process {}", self.pid)),
        }
    }

    /// Sends a signal to a container's init. The kernel drops a SIGTERM to the first process of a pid namespace that has
    /// no handler for it, and a container would seem to ignore its stop; it gets SIGKILL instead.
    pub(crate) fn signal_init(&self, signal: i32) -> Result<()> {
        let deaf = signal == libc::SIGTERM
            && std::fs::read_to_string(format!("/proc/{}/status", self.pid))
                .is_ok_and(|status| drops_sigterm(&status));
        self.signal(if deaf { libc::SIGKILL } else { signal })
    }
}

/// Whether `/proc/<pid>/status` tells of a first process of its pid namespace that neither blocks, ignores nor handles
/// SIGTERM.
fn drops_sigterm(status: &str) -> bool {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let first = field("NSpid").and_then(|pids| pids.split_whitespace().last()) == Some("1");
    let bit = 1u64 << (libc::SIGTERM - 1);
    let set =
        |name| field(name).and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(u64::MAX);
    first && ["SigBlk", "SigIgn", "SigCgt"].into_iter().all(|name| set(name) & bit == 0)
}

#[cfg(any(test, fuzzing))]
/// A status of anybody.
pub(crate) fn fuzz(text: &str) {
    drops_sigterm(text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_process_that_cannot_be_adopted_is_killed() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let ended = pidfd.try_clone().unwrap();
        // A file is never waited for, so that the runtime refuses it.
        let stdout = Some(tempfile::tempfile().unwrap().into());
        let streams = bulkhead_executor::Streams { stdout, ..Default::default() };
        let process = bulkhead_executor::Process { pid: pid.as_raw_pid(), pidfd, streams };
        let spawning = Arc::<crate::reaper::Reaper>::default().spawning();
        assert!(Process::adopt(process, 0, &spawning, Box::new(|_| {})).is_err());
        let mut fds = [rustix::event::PollFd::new(&ended, rustix::event::PollFlags::IN)];
        let patience = rustix::event::Timespec { tv_sec: 30, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&patience)), Ok(1), "it runs");
        // The reaper of another test may have been quicker.
        let _ = child.wait();
    }

    #[test]
    fn only_a_first_process_that_does_nothing_about_it_drops_sigterm() {
        let status = |pids: &str, caught: &str| {
            format!(
                "Name:\tx\nNSpid:\t{pids}\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\nSigCgt:\t{caught}\n"
            )
        };
        assert!(drops_sigterm(&status("812\t1", "0000000000000000")));
        assert!(!drops_sigterm(&status("812\t1", "0000000000004000")), "it has a handler");
        assert!(!drops_sigterm(&status("812\t7", "0000000000000000")), "not a first process");
        assert!(!drops_sigterm("Name:\tx\n"), "when in doubt the signal stays what it is");
    }
}
