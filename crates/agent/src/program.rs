//! Programs of the guest that the agent runs: hooks, modprobe, mkfs, iptables.
//!
//! The reaper collects every child, so a program's exit is heard of from there. Input and output are files in memory: no
//! pipe can fill up, and a program's children that keep one open delay nobody.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use rustix::fs::MemfdFlags;

use crate::{
    error::{During, Error, Result},
    reaper::{OnExit, Reaper},
};

/// The most of a program's output that is kept.
const OUTPUT: u64 = 4 << 20;

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Output {
    /// Its exit code; 128 + the signal when it was killed by one.
    pub(crate) code: i32,
    /// The first 4 MiB of its standard output.
    pub(crate) stdout: Vec<u8>,
    /// The first 4 MiB of its standard error.
    pub(crate) stderr: Vec<u8>,
}

impl Output {
    /// What it said, for a message: the standard error, else the standard output, in one line.
    pub(crate) fn words(&self) -> String {
        let said = if self.stderr.trim_ascii().is_empty() { &self.stdout } else { &self.stderr };
        String::from_utf8_lossy(said).split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// Runs a program to its end and gives it `input` to read; one that takes longer than `limit` is killed with its process
/// group, and that is [`Error::Timeout`]. Blocks; not to be called on the runtime's thread.
pub(crate) fn run(
    reaper: &Arc<Reaper>,
    mut command: Command,
    input: &[u8],
    limit: Duration,
) -> Result<Output> {
    let name = command.get_program().to_string_lossy().into_owned();
    let what = || format!("run {name}");
    let mut stdin = memory("stdin").during(what)?;
    stdin.write_all(input).and_then(|()| stdin.rewind()).during(what)?;
    let (mut stdout, mut stderr) = (memory("stdout").during(what)?, memory("stderr").during(what)?);
    command
        .stdin(stdin)
        .stdout(Stdio::from(stdout.try_clone().during(what)?))
        .stderr(Stdio::from(stderr.try_clone().during(what)?))
        .process_group(0);
    let spawning = reaper.spawning();
    let (exited, exit) = mpsc::channel();
    let child = command.spawn().during(what)?;
    let pid = rustix::process::Pid::from_child(&child);
    // Whoever gave up has no use for the exit.
    let on_exit: OnExit = Box::new(move |code| exited.send(code).unwrap_or_default());
    match rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()) {
        Ok(pidfd) => spawning.claim(pid.as_raw_nonzero().get(), pidfd.as_fd(), on_exit),
        // Nobody but the reaper can have been quicker, so the exit is among those that are kept.
        Err(rustix::io::Errno::SRCH) => spawning.claim_reaped(pid.as_raw_nonzero().get(), on_exit),
        Err(errno) => return Err(errno).during(what),
    }
    drop(spawning);
    let code = match exit.recv_timeout(limit) {
        Ok(code) => code,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            // ESRCH: it has ended meanwhile.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
            return Err(Error::Timeout(format!(
                "{name} did not end within {} s and was killed",
                limit.as_secs()
            )));
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            return Err(io::Error::other("its exit was not seen")).during(what);
        }
    };
    Ok(Output { code, stdout: read(&mut stdout).during(what)?, stderr: read(&mut stderr).during(what)? })
}

fn memory(name: &str) -> io::Result<File> {
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?.into())
}

fn read(file: &mut File) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.rewind()?;
    file.take(OUTPUT).read_to_end(&mut content)?;
    Ok(content)
}
