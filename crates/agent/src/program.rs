//! Programs of the guest that the agent runs: hooks, modprobe, mkfs, iptables.
//!
//! The reaper collects every child, so a program's exit is heard of from there. Input and output are files in memory: no
//! pipe can fill up, and a program's children that keep one open delay nobody. The files have a fixed size, so that a program
//! that says too much gets an error and not the guest's memory.

use std::{
    fs::File,
    io::{self, Read, Seek, Write},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
};

use rustix::fs::{MemfdFlags, SealFlags};

use crate::{
    error::{During, Error, Result},
    reaper::{OnExit, Reaper},
};

/// The most that a program can say; what it writes beyond fails.
const OUTPUT: u64 = 4 << 20;

/// And so much of it gets into a message.
const WORDS: usize = 4 << 10;

/// How a program ended.
#[derive(Debug)]
pub(crate) struct Output {
    /// Its exit code; 128 + the signal when it was killed by one.
    pub(crate) code: i32,
    /// Its standard output, of up to 4 MiB.
    pub(crate) stdout: Vec<u8>,
    /// Its standard error, of up to 4 MiB.
    pub(crate) stderr: Vec<u8>,
}

impl Output {
    /// What it said, for a message: the beginning of the standard error, else of the standard output, in one line.
    pub(crate) fn words(&self) -> String {
        let said =
            if self.stderr.trim_ascii().is_empty() { &self.stdout } else { &self.stderr }.trim_ascii_start();
        let said = said.get(..WORDS).unwrap_or(said);
        String::from_utf8_lossy(said).split_whitespace().collect::<Vec<_>>().join(" ")
    }
}

/// Runs a program to its end and gives it `input` to read; one that takes longer than `limit` is killed with its process
/// group, and that is [`Error::Timeout`]. Blocks; not to be called on the runtime's thread.
///
/// The command must have no working directory of its own: the library then uses posix_spawn(3), which does not mind that the
/// reaper was quicker to collect a child whose execve failed.
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
    let (mut stdout, mut stderr) = (output("stdout").during(what)?, output("stderr").during(what)?);
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
        Err(errno) => {
            // ESRCH: it has ended meanwhile.
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
            return Err(errno).during(what);
        }
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
    Ok(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?.into())
}

/// A file that does not grow; what is not written to takes no memory.
fn output(name: &str) -> io::Result<File> {
    let file = memory(name)?;
    file.set_len(OUTPUT)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    Ok(file)
}

/// What has been written. The program wrote at the offset that it shares with this file.
fn read(file: &mut File) -> io::Result<Vec<u8>> {
    let written = file.stream_position()?.min(OUTPUT);
    file.rewind()?;
    let mut content = Vec::new();
    file.take(written).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_the_beginning_of_what_was_said() {
        let said = |stdout: &[u8], stderr: &[u8]| {
            Output { code: 1, stdout: stdout.to_vec(), stderr: stderr.to_vec() }.words()
        };
        assert_eq!(said(b"out", b" \n"), "out");
        assert_eq!(said(b"out", b"went\n wrong\n"), "went wrong");
        let blank = vec![b' '; 2 * WORDS];
        assert_eq!(said(b"", &[&blank[..], b"late"].concat()), "late");
        assert_eq!(said(b"", &[b'x'; 2 * WORDS]).len(), WORDS);
    }

    #[test]
    fn output_is_what_was_written_and_bounded() {
        let mut file = output("test").unwrap();
        file.try_clone().unwrap().write_all(b"said").unwrap();
        assert_eq!(read(&mut file).unwrap(), b"said");
        let mut file = output("test").unwrap();
        let mut writer = file.try_clone().unwrap();
        writer.write_all(&vec![b'x'; 4 << 20]).unwrap();
        assert!(writer.write_all(b"x").is_err());
        assert_eq!(read(&mut file).unwrap().len(), 4 << 20);
    }
}
