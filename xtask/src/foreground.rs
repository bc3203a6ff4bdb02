//! `bulkhead run` as a user runs it: in the foreground, driven through its standard streams.

use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process;

/// A VM boots in seconds even without hardware virtualization; after this long, it is not going to.
const PATIENCE: Duration = Duration::from_secs(120);

/// A command that is running.
pub(crate) struct Foreground {
    name: String,
    pid: u32,
    started: Instant,
    stdin: Option<ChildStdin>,
    stdout: Receiver<(Instant, String)>,
    stderr: Receiver<String>,
    exit: Receiver<ExitStatus>,
}

impl Foreground {
    /// Starts a command with pipes for all its streams.
    pub(crate) fn start(command: &mut Command) -> Result<Foreground> {
        let name = Path::new(command.get_program()).display().to_string();
        let started = Instant::now();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (stdout, stderr) = stdout.zip(stderr).context("pipes were asked for")?;
        Ok(Foreground {
            name,
            pid: child.id(),
            started,
            stdin: child.stdin.take(),
            stdout: lines_of(stdout),
            stderr: text_of(stderr),
            exit: exit_of(child),
        })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.pid
    }

    /// The next line of its output, and when it came.
    pub(crate) fn line(&mut self) -> Result<(Duration, String)> {
        match self.stdout.recv_timeout(PATIENCE) {
            Ok((at, line)) => Ok((at - self.started, line)),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                self.kill();
                bail!("{} printed nothing for {} s{}", self.name, PATIENCE.as_secs(), self.last_words())
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                bail!("{} ended without the expected output{}", self.name, self.last_words())
            }
        }
    }

    /// Writes to its input.
    pub(crate) fn say(&mut self, text: &str) -> Result<()> {
        let input = self.stdin.as_mut().context("its input is open until it is finished")?;
        input.write_all(text.as_bytes()).with_context(|| format!("cannot write to {}", self.name))
    }

    /// Closes its input and waits for its end, which must be a success. Returns what it wrote on its standard error.
    pub(crate) fn finish(mut self) -> Result<String> {
        self.stdin = None;
        let Ok(status) = self.exit.recv_timeout(PATIENCE) else {
            self.kill();
            bail!("{} did not end within {} s{}", self.name, PATIENCE.as_secs(), self.last_words());
        };
        if !status.success() {
            bail!("{} failed ({status}){}", self.name, self.last_words());
        }
        Ok(self.stderr.recv_timeout(PATIENCE).unwrap_or_default())
    }

    fn kill(&self) {
        let _ = process::output(process::command("kill").args(["-KILL", &self.pid.to_string()]));
    }

    fn last_words(&self) -> String {
        let text = self.stderr.recv_timeout(Duration::from_secs(5)).unwrap_or_default();
        if text.is_empty() { String::new() } else { format!(":\n{}", process::last_lines(&text, 20)) }
    }
}

impl Drop for Foreground {
    /// What was not finished is ended the polite way: by signal, so that it cleans up.
    fn drop(&mut self) {
        if self.stdin.take().is_some() {
            let _ = process::output(process::command("kill").args(["-TERM", &self.pid.to_string()]));
            let _ = self.exit.recv_timeout(Duration::from_secs(30));
        }
    }
}

fn lines_of(stream: ChildStdout) -> Receiver<(Instant, String)> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if sender.send((Instant::now(), line)).is_err() {
                break;
            }
        }
    });
    receiver
}

fn text_of(mut stream: ChildStderr) -> Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

fn exit_of(mut child: Child) -> Receiver<ExitStatus> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        if let Ok(status) = child.wait() {
            let _ = sender.send(status);
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Foreground {
        Foreground::start(Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn a_conversation() {
        let mut cat = shell("echo ready; cat; echo done >&2");
        assert_eq!(cat.line().unwrap().1, "ready");
        cat.say("hello\n").unwrap();
        assert_eq!(cat.line().unwrap().1, "hello");
        assert_eq!(cat.finish().unwrap(), "done\n");
    }

    #[test]
    fn failures_show_what_was_said() {
        let error = shell("echo no such thing >&2; exit 3").finish().map(drop).unwrap_err().to_string();
        assert_eq!(error, "sh failed (exit status: 3):\nno such thing\n".trim_end());
        let error = shell("echo alas >&2").line().unwrap_err().to_string();
        assert_eq!(error, "sh ended without the expected output:\nalas");
    }
}
