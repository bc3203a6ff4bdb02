//! `bulkhead exec`: a further process in a container that runs.
//!
//! It talks to the guest's agent itself. As the agent demands, the output is read to its end before the exit code is asked
//! for, because asking forgets the process.

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use bulkhead_protocol::{
    agent::{
        CloseStdinRequest, ExecProcessRequest, ReadStreamRequest, SignalProcessRequest, TtyWinResizeRequest,
        WaitProcessRequest, WriteStreamRequest,
    },
    agent_ttrpc::AgentServiceClient,
    oci_json,
    ports::STDIO_CHUNK,
    status::Kind,
};
use bulkhead_sandbox::Config;
use clap::Args;
use oci_spec::runtime as oci;
use tokio::net::unix::pipe::Receiver;

use crate::{
    conversation::{self, End, Partner},
    failure,
    inroot::Root,
    name, run,
    running::{self, Running, bounded, unbounded},
    signals::Signals,
    spec::{self, Overrides},
    streams::{self, Health, Sink},
    tty, user,
};

/// Runs a further command in a running container.
///
/// The exit code is the command's; 125, 126 and 127 are as with run.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Pass the standard input on; without it the command reads end-of-file
    #[arg(short, long)]
    interactive: bool,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set an environment variable, or pass one of ours on
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = spec::check_setting)]
    env: Vec<String>,
    /// Working directory in the container
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// User in the container
    #[arg(short, long, value_name = "UID[:GID]|NAME", value_parser = user::check)]
    user: Option<String>,
    /// The container
    #[arg(value_parser = name::check)]
    name: String,
    /// The command
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Runs the command; returns its exit code.
pub(crate) fn run(args: Exec) -> Result<u8> {
    run::ensure_root()?;
    tty::check(args.interactive, args.tty)?;
    let config = Config::load()?;
    let running = running::find_alive(&config, &args.name)?;
    let overrides = Overrides {
        env: spec::settings(&args.env, |name| std::env::var(name).ok()),
        cwd: args.workdir,
        command: args.command,
        terminal: args.tty,
        size: if args.tty { tty::size() } else { None },
    };
    let process = process(&running, &overrides, args.user.as_deref())?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let code = runtime.block_on(execute(&running, &process, args.interactive, overrides.size));
    runtime.shutdown_background();
    code
}

/// The process to add, from the container's own one and the command line.
fn process(running: &Running, overrides: &Overrides, user: Option<&str>) -> Result<oci::Process> {
    let file = running.bundle().context("the run keeps no bundle")?.join("config.json");
    let spec = oci::Spec::load(&file)
        .with_context(|| format!("read {}; is the container started?", file.display()))?;
    let user = match user {
        Some(text) => {
            let rootfs =
                Path::new(running.label(running::ROOTFS).context("the run keeps no root file system")?);
            let root =
                Root::open(rootfs).with_context(|| format!("root file system {}", rootfs.display()))?;
            Some(user::resolve(&root, text)?)
        }
        None => None,
    };
    spec::exec(&spec, overrides, user.as_ref())
}

async fn execute(
    running: &Running,
    process: &oci::Process,
    interactive: bool,
    size: Option<(u16, u16)>,
) -> Result<u8> {
    let mut signals = Signals::install().context("signal handlers")?;
    let remote = Remote {
        agent: Arc::new(running.agent().await?),
        bound: running.bound(),
        container: running.state.id.clone(),
        exec: format!("exec-{}", name::fresh_id()?),
        terminal: process.terminal().unwrap_or(false),
        health: Arc::new(Health::default()),
    };
    // Raw only once nothing is left that the user may want to interrupt.
    let raw = if interactive && remote.terminal { Some(tty::Raw::enter()?) } else { None };
    let started = remote.start(process).await;
    started.with_context(|| format!("exec in container {}", running.name()))?;
    if let Some((rows, columns)) = size {
        remote.resize(rows, columns).await?;
    }
    if interactive {
        let input = Receiver::from_owned_fd(streams::input()?)?;
        tokio::spawn(feed(remote.clone(), input));
    } else if !remote.terminal {
        remote.close_stdin().await?;
    }
    let end = conversation::hold(&remote, remote.terminal, &mut signals, &remote.health).await;
    if matches!(end, Ok(End::Forced)) {
        remote.signal(libc::SIGKILL.unsigned_abs(), false).await?;
    }
    drop(raw);
    match conversation::output_failure(&remote.health) {
        Some(failure) => Err(failure),
        None => Ok(conversation::code(&end?, &remote.health)),
    }
}

/// The process in the guest.
#[derive(Clone)]
struct Remote {
    agent: Arc<AgentServiceClient>,
    bound: Duration,
    container: String,
    exec: String,
    terminal: bool,
    health: Arc<Health>,
}

#[derive(Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

impl Remote {
    async fn start(&self, process: &oci::Process) -> Result<()> {
        let request = ExecProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            process: Some(oci_json::process(process)?).into(),
            ..Default::default()
        };
        self.agent
            .exec_process(bounded(self.bound), &request)
            .await
            .map_err(|error| failure::agent("ExecProcess", &error))?;
        Ok(())
    }

    async fn close_stdin(&self) -> Result<()> {
        let request = CloseStdinRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..Default::default()
        };
        match self.agent.close_stdin(bounded(self.bound), &request).await {
            // A quick command has ended meanwhile.
            Err(error) if Kind::of_error(&error) != Kind::NotFound => {
                Err(failure::agent("CloseStdin", &error).into())
            }
            _ => Ok(()),
        }
    }

    /// Copies an output to its end.
    async fn drain(&self, stream: Stream, sink: &Sink) -> Result<()> {
        let request = ReadStreamRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            len: u32::try_from(STDIO_CHUNK).unwrap_or(u32::MAX),
            ..Default::default()
        };
        loop {
            let read = match stream {
                Stream::Stdout => self.agent.read_stdout(unbounded(), &request).await,
                Stream::Stderr => self.agent.read_stderr(unbounded(), &request).await,
            };
            match read {
                Ok(reply) if reply.data.is_empty() => return Ok(()),
                Ok(reply) => {
                    if !sink.write(reply.data).await {
                        return Ok(());
                    }
                }
                Err(error) if Kind::of_error(&error) == Kind::Unavailable => {
                    return Err(failure::agent("ReadStdout", &error).into());
                }
                // The end of a terminal is an error (EIO), as it is on any host.
                Err(_) => return Ok(()),
            }
        }
    }
}

/// Copies the user's input until it ends or nobody wants it any more.
async fn feed(remote: Remote, input: Receiver) {
    loop {
        let mut data = vec![0; STDIO_CHUNK];
        match input.try_read(&mut data) {
            Ok(0) => break,
            Ok(read) => data.truncate(read),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => match input.readable().await {
                Ok(()) => continue,
                Err(_) => break,
            },
            Err(_) => break,
        }
        while !data.is_empty() {
            let request = WriteStreamRequest {
                container_id: remote.container.clone(),
                exec_id: remote.exec.clone(),
                data: data.clone(),
                ..Default::default()
            };
            match remote.agent.write_stdin(unbounded(), &request).await {
                Ok(reply) => drop(data.drain(..data.len().min(reply.len as usize).max(1))),
                Err(_) => return,
            }
        }
    }
    // Closing a terminal's input would hang it up; its user types Ctrl-D.
    if !remote.terminal {
        let _ = remote.close_stdin().await;
    }
}

impl Partner for Remote {
    async fn signal(&self, signal: u32, _all: bool) -> Result<()> {
        let request = SignalProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            signal,
            ..Default::default()
        };
        let sent = self.agent.signal_process(bounded(self.bound), &request).await;
        sent.map(drop).map_err(|error| failure::agent("SignalProcess", &error).into())
    }

    async fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        let request = TtyWinResizeRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            row: rows.into(),
            column: columns.into(),
            ..Default::default()
        };
        let sent = self.agent.tty_win_resize(bounded(self.bound), &request).await;
        sent.map(drop).map_err(|error| failure::agent("TtyWinResize", &error).into())
    }

    async fn wait(&self) -> Result<i32> {
        let stdout = Sink::stdout(&self.health)?;
        let stderr = Sink::stderr(&self.health)?;
        let errors = async { if self.terminal { Ok(()) } else { self.drain(Stream::Stderr, &stderr).await } };
        tokio::try_join!(self.drain(Stream::Stdout, &stdout), errors)?;
        let request = WaitProcessRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            ..Default::default()
        };
        let reply = self.agent.wait_process(unbounded(), &request).await;
        Ok(reply.map_err(|error| failure::agent("WaitProcess", &error))?.status)
    }
}
