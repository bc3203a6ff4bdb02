//! A person at a terminal: a command on a pseudo terminal of ours.

use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::bail;
use nix::pty::openpty;
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::Finished;

const BOUND: Duration = Duration::from_secs(120);

/// A command whose terminal is in our hands.
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Receiver<Vec<u8>>,
    seen: String,
}

impl Terminal {
    /// Starts a command on a terminal of `rows` by `columns`.
    pub fn start(mut command: Command, rows: u16, columns: u16) -> anyhow::Result<Terminal> {
        let pty = openpty(None, None)?;
        tcsetwinsize(&pty.master, window(rows, columns))?;
        let slave = File::from(pty.slave);
        command.stdin(slave.try_clone()?).stdout(slave.try_clone()?).stderr(Stdio::from(slave));
        let child = command.spawn()?;
        // Drops the command's copies of the slave, so that the end of output is seen.
        drop(command);
        let keyboard = File::from(pty.master);
        let mut master = keyboard.try_clone()?;
        let (sender, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                match master.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(count) => {
                        if sender.send(buffer[..count].to_vec()).is_err() {
                            break;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
        });
        Ok(Terminal { child, keyboard, screen, seen: String::new() })
    }

    /// Types.
    pub fn send(&mut self, text: &str) -> anyhow::Result<()> {
        self.keyboard.write_all(text.as_bytes())?;
        Ok(())
    }

    /// Waits until `part` is on the screen, and forgets what came up to and with it.
    pub fn wait_for(&mut self, part: &str) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            if let Some(at) = self.seen.find(part) {
                self.seen.drain(..at + part.len());
                return Ok(());
            }
            let Some(left) = BOUND.checked_sub(start.elapsed()) else {
                bail!("no {part:?} on the screen: {:?}", self.seen)
            };
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => bail!("no {part:?} on the screen: {:?}", self.seen),
            }
        }
    }

    /// Changes the window's size, as a window manager would: the foreground process gets SIGWINCH.
    pub fn resize(&mut self, rows: u16, columns: u16) -> anyhow::Result<()> {
        tcsetwinsize(&self.keyboard, window(rows, columns))?;
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id())?);
        // The command has no controlling terminal here, so the kernel signals nobody by itself.
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGWINCH)?;
        Ok(())
    }

    /// Whether the terminal is back in its normal mode: a line is edited and echoed.
    pub fn is_cooked(&self) -> anyhow::Result<bool> {
        let attributes = tcgetattr(&self.keyboard)?;
        Ok(attributes.local_modes.contains(LocalModes::ICANON | LocalModes::ECHO))
    }

    /// Waits for the end of the command; the screen's rest is its output.
    pub fn finish(mut self) -> anyhow::Result<Finished> {
        let start = Instant::now();
        loop {
            match self.screen.recv_timeout(BOUND.saturating_sub(start.elapsed())) {
                Ok(bytes) => self.seen.push_str(&String::from_utf8_lossy(&bytes)),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {
                    bail!("no end; on the screen: {:?}", self.seen)
                }
            }
        }
        let mut finished = Finished::try_from(self.child)?;
        finished.stdout = self.seen.into_bytes();
        Ok(finished)
    }
}

fn window(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
