//! The debug console: a shell of the guest for whoever looks into it from the host. Off unless asked for.
//!
//! The shell leads a session of its own, and nobody can say that to posix_spawn(3); a fork would not do, because only the
//! reaper may wait for a child whose execve failed. So it is this program that is started, which becomes the shell.

use std::{
    io::{self, Write},
    os::{fd::OwnedFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use rustix::{
    fs::{Access, Mode, OFlags},
    process::PidfdFlags,
    pty::OpenptFlags,
};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::{
    error::{During, Error, Result},
    passfd, port,
    process::Process,
    reaper::Reaper,
    sync::blocking,
};

/// What this program is called when it is to become a shell.
const NAME: &str = "bulkhead-console";

/// Shells, best first. The first is part of an image that can be added to a guest.
const SHELLS: [&str; 3] = ["/run/kata-extensions/devkit/bin/devkit-sh", "/bin/bash", "/bin/sh"];
const SERIAL: &str = "/dev/console";
const ENVIRONMENT: [(&str, &str); 3] =
    [("PATH", "/bin:/sbin:/usr/bin:/usr/sbin"), ("HOME", "/"), ("TERM", "linux")];

/// Becomes the shell that the first argument names, if this program was started for that. To be called first in `main`.
pub(crate) fn child_main() {
    let mut arguments = std::env::args_os();
    if let (Some(name), Some(shell)) = (arguments.next(), arguments.next())
        && name == NAME
    {
        let error = become_shell(Path::new(&shell));
        // Standard error is the terminal; whoever was there may be gone.
        let _ = writeln!(io::stderr(), "bulkhead-agent: no debug console: {error}");
        std::process::exit(127)
    }
}

/// Returns only when it fails.
fn become_shell(shell: &Path) -> Error {
    let terminal = || -> io::Result<()> {
        rustix::process::setsid()?;
        Ok(rustix::process::ioctl_tiocsctty(io::stdin())?)
    };
    if let Err(error) = terminal().during(|| "make the terminal that of a session".into()) {
        return error;
    }
    let source = Command::new(shell).arg("-i").exec();
    Error::Io { what: format!("run {}", shell.display()), source }
}

/// Opens the console: a shell for every connection of the host to a vsock port, or with port 0 one on the serial console.
pub(crate) fn open(port: u32, reaper: Arc<Reaper>) -> Result<()> {
    if port == 0 {
        crate::sync::spawn(async move {
            match blocking(move || serial(&reaper)).await {
                Ok(shell) => drop(shell.ended().await),
                Err(error) => tracing::error!("debug console on {SERIAL}: {error}"),
            }
        });
        return Ok(());
    }
    port::serve(port, "the debug console", move |connection, _| {
        let reaper = Arc::clone(&reaper);
        crate::sync::spawn(async move {
            if let Err(error) = session(connection, &SHELLS, reaper).await {
                tracing::warn!("debug console: {error}");
            }
        });
    })
}

/// Serves one connection: a shell on a terminal of its own, killed when the connection ends.
async fn session(
    connection: impl AsyncRead + AsyncWrite + Unpin,
    shells: &'static [&'static str],
    reaper: Arc<Reaper>,
) -> Result<()> {
    let (input, mut output) = tokio::io::split(connection);
    let shell = match blocking(move || on_terminal(shells, &reaper)).await {
        Ok(shell) => shell,
        Err(error) => {
            // Whoever connected is a person who waits for a prompt.
            let told = format!("bulkhead-agent: no debug console: {error}\r\n");
            let _ = output.write_all(told.as_bytes()).await;
            let _ = output.shutdown().await;
            return Err(error);
        }
    };
    tokio::select! {
        // An error is the end of the connection.
        _ = shell.streams.stdout.copy_to(&mut output, shell.exit()) => {}
        () = hung_up(input, &shell) => {}
    }
    shell.kill_group();
    let _ = output.shutdown().await;
    Ok(())
}

/// Hands over what is typed until the peer is gone. A shell that ends by itself has its last words, first.
async fn hung_up(input: impl AsyncRead + Unpin, shell: &Process) {
    passfd::receive(input, shell).await;
    if shell.exit_code().is_some() {
        std::future::pending().await
    }
}

fn on_terminal(shells: &[&str], reaper: &Arc<Reaper>) -> Result<Arc<Process>> {
    let shell = find(shells)?;
    let what = || "make a terminal".to_owned();
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags).during(what)?;
    rustix::pty::grantpt(&master).during(what)?;
    rustix::pty::unlockpt(&master).during(what)?;
    let name = rustix::pty::ptsname(&master, Vec::new()).during(what)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name, flags, Mode::empty()).during(what)?;
    let status = rustix::fs::fcntl_getfl(&master).during(what)?;
    rustix::fs::fcntl_setfl(&master, status | OFlags::NONBLOCK).during(what)?;
    spawn(&shell, slave, Some(master), reaper)
}

fn serial(reaper: &Arc<Reaper>) -> Result<Arc<Process>> {
    let shell = find(&SHELLS)?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = rustix::fs::open(SERIAL, flags, Mode::empty()).during(|| format!("open {SERIAL}"))?;
    spawn(&shell, console, None, reaper)
}

fn find(shells: &[&str]) -> Result<PathBuf> {
    let runs = |path: &&Path| path.is_file() && rustix::fs::access(*path, Access::EXEC_OK).is_ok();
    let shell = shells.iter().map(Path::new).find(runs);
    shell.map(Path::to_owned).ok_or_else(|| {
        Error::State(format!("the guest has no shell; one is looked for at {}", shells.join(", ")))
    })
}

fn spawn(
    shell: &Path,
    terminal: OwnedFd,
    master: Option<OwnedFd>,
    reaper: &Arc<Reaper>,
) -> Result<Arc<Process>> {
    let what = || format!("run {}", shell.display());
    let copy = || terminal.try_clone().map(Stdio::from).during(what);
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(shell).env_clear().envs(ENVIRONMENT);
    command.stdin(copy()?).stdout(copy()?).stderr(copy()?);
    let spawning = reaper.spawning();
    let child = command.spawn().during(what)?;
    let pid = rustix::process::Pid::from_child(&child);
    // The number is not given away while the guard keeps exits; only a child that was reaped already has none.
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).during(what)?;
    let streams = bulkhead_executor::Streams { terminal: master, ..Default::default() };
    let process = bulkhead_executor::Process { pid: pid.as_raw_nonzero().get(), pidfd, streams };
    Process::adopt(process, 0, &spawning, Box::new(|_| {}))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_a_shell_the_client_is_told() {
        let (mut client, ours) = tokio::io::duplex(4096);
        let failed = session(ours, &["/does/not/exist", "/nor/this"], Arc::default()).await;
        assert!(matches!(failed, Err(Error::State(_))));
        let mut told = String::new();
        tokio::io::AsyncReadExt::read_to_string(&mut client, &mut told).await.unwrap();
        assert!(told.contains("no shell") && told.contains("/nor/this") && told.ends_with("\r\n"), "{told}");
    }

    #[test]
    fn a_shell_is_a_file_that_can_be_run() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("text"), "x").unwrap();
        let [folder, text] =
            ["", "text"].map(|name| directory.path().join(name).to_str().unwrap().to_owned());
        assert!(matches!(find(&[&folder, &text]), Err(Error::State(_))));
        assert_eq!(find(&[&folder, &text, "/proc/self/exe"]).unwrap(), Path::new("/proc/self/exe"));
    }
}
