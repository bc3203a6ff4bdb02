//! The child: what a program becomes when it is started as `bulkhead-init`.
//!
//! ```text
//! caller ──► short-lived child: receives the plan, joins or makes the pid namespace,
//!   │            └─► the process, a child of the caller too (CLONE_PARENT), born in its cgroup
//!   │                   the stages of the plan's kind, top to bottom, then execve
//! ```
//! It has one thread, takes no decision, and ends with the first stage that fails, of which it reports the name and the
//! errno. Every descriptor is close-on-exec from the start, and again before execve.

mod credentials;
mod devices;
mod exec;
mod fault;
mod hooks;
mod mounts;
mod namespaces;
mod process;
mod procfs;
mod rootfs;
mod terminal;
mod user;

#[cfg(any(test, fuzzing))]
pub(crate) use user::fuzz as fuzz_user;

use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{fs::Mode, process::DumpableBehavior};

use crate::{
    Stage,
    channel::{Channel, Failure, FromChild, ToChild},
    plan::{Kind, NamespaceKind, Plan},
    root::Root,
    spawn::NAME,
    sys::{self, Cloned},
};
use fault::{Fault, Outcome};
use procfs::Procfs;

/// A stage: its name, and what it does.
type Step = (Stage, fn(&mut Child) -> Outcome);

/// What makes a container and its first process.
const CREATE: &[Step] = &[
    (Stage::Session, process::session),
    (Stage::OomScore, process::oom_score),
    (Stage::Namespaces, namespaces::enter),
    (Stage::Hostname, namespaces::hostname),
    (Stage::Sysctls, namespaces::sysctls),
    (Stage::Rootfs, rootfs::prepare),
    (Stage::Mounts, mounts::make),
    (Stage::Devices, devices::make),
    (Stage::Terminal, terminal::open),
    (Stage::Terminal, terminal::console),
    (Stage::WorkingDirectory, process::make_directory),
    (Stage::Hook, hooks::of_caller),
    (Stage::Hook, hooks::create_container),
    (Stage::ProtectedPaths, rootfs::protect),
    (Stage::PivotRoot, rootfs::pivot),
    (Stage::WorkingDirectory, process::change_directory),
    (Stage::User, user::look_up),
    (Stage::Environment, process::environment),
    (Stage::Streams, terminal::streams),
    (Stage::Rlimits, process::rlimits),
    (Stage::Credentials, credentials::change),
    (Stage::FindCommand, exec::find),
    (Stage::Release, exec::wait_for_release),
    (Stage::Hook, hooks::start_container),
    (Stage::Confinement, credentials::confine),
    (Stage::Exec, exec::execute),
];

/// What makes a further process in a container.
const EXEC: &[Step] = &[
    (Stage::Session, process::session),
    (Stage::OomScore, process::oom_score),
    (Stage::Namespaces, namespaces::enter),
    (Stage::Terminal, terminal::open),
    (Stage::WorkingDirectory, process::make_directory),
    (Stage::WorkingDirectory, process::change_directory),
    (Stage::User, user::look_up),
    (Stage::Environment, process::environment),
    (Stage::Streams, terminal::streams),
    (Stage::Rlimits, process::rlimits),
    (Stage::Credentials, credentials::change),
    (Stage::FindCommand, exec::find),
    (Stage::Confinement, credentials::confine),
    (Stage::Exec, exec::execute),
];

/// What the stages work on, and what they leave to each other.
struct Child {
    plan: Plan,
    channel: Channel,
    /// The caller's `/proc`, which no container can have prepared.
    procfs: Procfs,
    /// The container's root, once there is one.
    root: Root,
    /// The cgroup's directory.
    cgroup: Option<OwnedFd>,
    /// Standard streams that are not a terminal.
    stdio: Vec<OwnedFd>,
    /// Namespaces to join.
    join: Vec<(NamespaceKind, OwnedFd)>,
    /// The namespaces the process is in, for the caller to keep.
    namespaces: Vec<OwnedFd>,
    /// A `/dev/null` that is one.
    null: Option<OwnedFd>,
    /// The terminal's slave.
    slave: Option<OwnedFd>,
    /// The environment.
    env: Vec<CString>,
    /// The command's file.
    command: CString,
}

/// To be called first in `main` of every program that links the executor: if this process was started as a container's
/// child, becomes it and never returns; otherwise returns at once.
pub fn child_main() {
    if std::env::args_os().next().is_some_and(|name| name == NAME) {
        main()
    }
}

fn main() -> ! {
    let code = match run() {
        Ok(()) => 0,
        // The channel is not there to say it on.
        Err(error) => {
            eprintln!("{NAME}: {error}; it is started by its executor, not by hand");
            1
        }
    };
    sys::exit(code)
}

fn run() -> io::Result<()> {
    rustix::thread::set_name(c"bulkhead-init")?;
    // Nothing that the caller had open, by whatever mistake, reaches a container.
    sys::close_from(3)?;
    let channel = Channel::new(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
    let Some((ToChild::Plan(plan), fds)) = channel.receive()? else {
        return Err(io::Error::other("no plan"));
    };
    // Processes of a container it joins must not reach into this one.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::process::umask(Mode::empty());

    let mut child = match Child::new(*plan, fds, &channel) {
        Ok(child) => child,
        Err(fault) => return report(&channel, Stage::Spawn, fault),
    };
    if let Err(fault) = namespaces::enter_pid(&child) {
        return report(&channel, Stage::Namespaces, fault);
    }
    let joins_pid = child.plan.namespaces.join.contains(&NamespaceKind::Pid);
    // The process speaks only after it has been announced.
    let (announced, announce) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
    match sys::clone_sibling(child.cgroup.as_ref().map(AsFd::as_fd)) {
        Ok(Cloned::Child) => {
            drop(announce);
            if rustix::io::read(&announced, &mut [0u8; 1])? == 0 {
                return Err(io::Error::other("not announced"));
            }
            drop(announced);
            let Err((stage, fault)) = child.become_process();
            report(&channel, stage, fault)
        }
        Ok(Cloned::Sibling { pid, pidfd }) => {
            channel.send(&FromChild::Spawned { pid }, &[pidfd.as_fd()])?;
            rustix::io::write(announce, &[1])?;
            Ok(())
        }
        // What the kernel says when the first process of a pid namespace is gone.
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) && joins_pid => {
            report(&channel, Stage::Spawn, Fault::new(libc::ENOMEM, "has the pid namespace it joins ended?"))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
            let text =
                "no further process is allowed; see the container's limit (pids.max), and the machine's";
            report(&channel, Stage::Spawn, Fault::new(libc::EAGAIN, text))
        }
        Err(error) => report(&channel, Stage::Spawn, error.into()),
    }
}

fn report(channel: &Channel, stage: Stage, fault: Fault) -> io::Result<()> {
    let failure = Failure { stage, detail: fault.detail, errno: fault.errno };
    channel.send(&FromChild::Failed(failure), &[])?;
    sys::exit(1)
}

impl Child {
    fn new(plan: Plan, fds: Vec<OwnedFd>, channel: &Channel) -> Result<Child, Fault> {
        let mut fds = fds.into_iter();
        let cgroup = if plan.cgroup { fds.next() } else { None };
        let streams = if plan.process.terminal { 0 } else { 3 };
        let stdio: Vec<OwnedFd> = fds.by_ref().take(streams).collect();
        let join: Vec<_> = plan.namespaces.join.iter().copied().zip(fds).collect();
        if cgroup.is_some() != plan.cgroup
            || stdio.len() != streams
            || join.len() != plan.namespaces.join.len()
        {
            return Err(Fault::new(libc::EPROTO, "descriptors are missing"));
        }
        Ok(Child {
            channel: Channel::new(rustix::io::fcntl_dupfd_cloexec(channel, 3)?),
            procfs: Procfs::open()?,
            root: Root::own()?,
            plan,
            cgroup,
            stdio,
            join,
            namespaces: Vec::new(),
            null: None,
            slave: None,
            env: Vec::new(),
            command: CString::default(),
        })
    }

    /// Goes through the stages; returns only with the one that failed.
    fn become_process(&mut self) -> Result<std::convert::Infallible, (Stage, Fault)> {
        let steps = match self.plan.kind {
            Kind::Create => CREATE,
            Kind::Exec => EXEC,
        };
        for (stage, step) in steps {
            step(self).map_err(|fault| (*stage, fault))?;
        }
        Err((Stage::Exec, Fault::new(libc::ENOSYS, "no stage executed the command")))
    }
}
