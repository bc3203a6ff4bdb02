//! A pod on the host: one VM, its agent, and the containers in it. The brain that the shim and the command line share.
//!
//! ```text
//! Config + SandboxSpec ──Sandbox::start()──► Sandbox ──create_container()──► Container ──start/exec/kill/wait──► Exit
//!                                               └── stop(): nothing is left: process, mount, socket, file
//! ```
//!
//! What comes from the guest is untrusted here. The OCI configuration is edited in one file, `spec.rs`.

mod agent;
mod config;
mod container;
mod error;
#[cfg(test)]
mod fake_agent;
mod guest;
mod launch;
mod mountns;
mod process;
mod processes;
mod roster;
mod sandbox;
mod spec;
mod state;
mod stdio;
mod storage;

pub use config::{Config, Hypervisor};
pub use container::{Container, ContainerSpec, Exit, ProcessState, Rootfs, RootfsMount};
pub use error::Error;
pub use mountns::enter_private_mount_namespace;
pub use sandbox::{GuestTimings, Sandbox, SandboxSpec, Timings};
pub use state::{Owned, State, cleanup, list, load};
pub use stdio::{Stdio, StdioTarget};
