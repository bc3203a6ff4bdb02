//! The `bulkhead` program as a user runs it.

use std::{
    ffi::OsStr,
    io::Write,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
};

use anyhow::{Context, ensure};

use crate::Prefix;

/// The program, with an environment.
pub struct Cli {
    program: PathBuf,
    env: Vec<(String, PathBuf)>,
}

/// A finished command.
#[derive(Debug)]
pub struct Finished {
    /// Exit code, or 128 + signal.
    pub code: i32,
    /// All of its output.
    pub stdout: Vec<u8>,
    /// All of its errors.
    pub stderr: String,
}

impl Finished {
    /// The output as text without the final newline.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Fails unless the exit code is `code`.
    pub fn expect(self, code: i32) -> anyhow::Result<Finished> {
        ensure!(
            self.code == code,
            "exit code {} instead of {code}\nstdout: {}\nstderr: {}",
            self.code,
            self.text(),
            self.stderr
        );
        Ok(self)
    }

    /// Fails unless the errors contain `part`.
    pub fn expect_error(self, part: &str) -> anyhow::Result<Finished> {
        ensure!(self.stderr.contains(part), "no {part:?} in the errors:\n{}", self.stderr);
        Ok(self)
    }
}

impl Cli {
    /// The program of `prefix`.
    pub fn new(prefix: &Prefix) -> Cli {
        Cli { program: prefix.bulkhead(), env: Vec::new() }
    }

    /// The same with a configuration file.
    #[must_use]
    pub fn config(mut self, file: PathBuf) -> Cli {
        self.env.push(("BULKHEAD_CONFIG".to_owned(), file));
        self
    }

    /// The command, for a case that needs its own pipes.
    pub fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).envs(self.env.iter().map(|(key, value)| (key, value))).stdin(Stdio::null());
        command
    }

    /// Runs to the end.
    pub fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> anyhow::Result<Finished> {
        self.run_with_input(args, b"")
    }

    /// Runs to the end with standard input.
    pub fn run_with_input<S: AsRef<OsStr>>(&self, args: &[S], input: &[u8]) -> anyhow::Result<Finished> {
        let mut child = self
            .command(args)
            .stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting {}", self.program.display()))?;
        let writer = child.stdin.take().map(|mut pipe| {
            let input = input.to_vec();
            // A command that ends without reading closes the pipe: no failure of the case.
            thread::spawn(move || pipe.write_all(&input).ok())
        });
        let finished = finish(child)?;
        if let Some(writer) = writer {
            writer.join().map_err(|_| anyhow::anyhow!("writing standard input panicked"))?;
        }
        Ok(finished)
    }
}

/// Waits for a child and collects its output.
fn finish(child: Child) -> anyhow::Result<Finished> {
    use std::os::unix::process::ExitStatusExt;
    let output = child.wait_with_output()?;
    let code = output.status.code().unwrap_or_else(|| 128 + output.status.signal().unwrap_or(0));
    Ok(Finished { code, stdout: output.stdout, stderr: String::from_utf8_lossy(&output.stderr).into_owned() })
}

impl TryFrom<Child> for Finished {
    type Error = anyhow::Error;

    fn try_from(child: Child) -> anyhow::Result<Finished> {
        finish(child)
    }
}
