//! Runs OCI containers on Linux: namespaces, root file system, limits, credentials, and the user's command.
//!
//! Synchronous, and ignorant of RPC servers, vsock, tokio and virtual machines. Every decision is taken in the parent
//! (`plan`), one typed message carries them to a child that is this same binary executed again, and what fails there
//! comes back as a stage and an errno.
//!
//! The executor never waits for a child: whoever owns SIGCHLD reaps. Each spawned process leaves two children of the
//! caller: a short-lived one that joins or makes the namespaces, and the process itself.

mod cgroup;
mod channel;
mod container;
mod device_filter;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hooks;
mod host;
mod init;
mod namespace_files;
mod plan;
mod root;
mod seccomp;
mod spawn;
mod streams;
mod sys;

pub use cgroup::stats::{CpuStats, HugetlbStats, IoStats, MemoryStats, PidsStats, Stats};
pub use container::{Config, Container, Process, Size, Status, Streams};
pub use error::{Error, Stage};
pub use hooks::{Hook, HookRunner};
pub use init::child_main;
pub use plan::UserNames;
pub use root::{Node, Root};
