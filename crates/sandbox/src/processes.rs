//! Processes of a pod as its state file names them: told from later ones with the same pid, and killed through pidfds.

use std::{
    os::fd::OwnedFd,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    poll::{PollFd, PollFlags, PollTimeout, poll},
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::state::Owned;

impl Owned {
    /// The process that has this pid now; `None` when there is none, or only a zombie.
    pub(crate) fn of(pid: u32) -> Option<Owned> {
        Some(Owned { pid, start_time: start_time(pid)? })
    }

    /// Whether this very process still runs.
    pub(crate) fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// Refers to this very process whatever becomes of its pid.
    fn pidfd(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.pid).ok()?)?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).ok()?;
        // Compared after opening: from here on the descriptor cannot come to mean another process.
        self.is_alive().then_some(pidfd)
    }
}

/// Kills processes and waits until they are gone, at most `bound`. Returns those that are not.
pub(crate) fn kill(processes: &[Owned], bound: Duration) -> Vec<Owned> {
    let doomed: Vec<_> = processes.iter().filter_map(|process| Some((process, process.pidfd()?))).collect();
    for (process, pidfd) in &doomed {
        if let Err(errno) = pidfd_send_signal(pidfd, Signal::KILL) {
            tracing::warn!("killing process {}: {errno}", process.pid);
        }
    }
    let deadline = Instant::now() + bound;
    let survivors = doomed.into_iter().filter(|(_, pidfd)| !ends_by(pidfd, deadline));
    survivors.map(|(process, _)| process.clone()).collect()
}

fn ends_by(pidfd: &OwnedFd, deadline: Instant) -> bool {
    use std::os::fd::AsFd;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], timeout) {
            Err(Errno::EINTR) => {}
            outcome => return outcome == Ok(1),
        }
    }
}

/// Field 22 of `/proc/<pid>/stat`, of a process that is not a zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, field 2, is in parentheses and may contain anything.
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(22 - 4)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn only_the_very_process_is_killed() {
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let own = Owned::of(child.id()).unwrap();
        let other = Owned { pid: own.pid, start_time: own.start_time + 1 };
        assert!(own.is_alive() && !other.is_alive());
        assert!(kill(&[other], Duration::from_secs(1)).is_empty());
        assert!(child.try_wait().unwrap().is_none(), "a process with another start time was killed");
        assert!(kill(std::slice::from_ref(&own), Duration::from_secs(5)).is_empty());
        assert!(!own.is_alive(), "a zombie is not alive");
        assert!(child.wait().unwrap().code().is_none());
        assert_eq!(Owned::of(child.id()), None);
    }

    #[test]
    fn the_start_time_is_field_22() {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        // This program's name has no blanks, so that counting fields is right here.
        let field = stat.split(' ').nth(21).unwrap().parse().ok();
        assert_eq!(start_time(std::process::id()), field);
    }
}
