//! The end-to-end test framework: real VMs, a real containerd, and a census of what is left behind.
//!
//! `agent` drives a guest agent alone, without the rest of the product.
//!
//! A test file under `tests/` has a `main` that hands its cases to [`run`]; a case is a function of a [`Scratch`], takes
//! about six lines, and fails by returning an error. Before and after each case the machine is counted ([`Census`]): a
//! case that leaves a process, mount, socket, network namespace, link, cgroup or state directory behind fails.

pub mod agent;
mod census;
mod cli;
mod containerd;
mod cri;
mod image;
mod prefix;
mod rootfs;
mod runner;
mod scratch;
mod terminal;

pub use census::Census;
pub use cli::{Cli, Finished};
pub use containerd::{Containerd, Flavour};
pub use cri::{Cri, PodConfig, Streamed};
pub use image::{Layer, docker_archive, oci_archive};
pub use prefix::Prefix;
pub use rootfs::busybox_rootfs;
pub use runner::{Case, Skip, run};
pub use scratch::Scratch;
pub use terminal::Terminal;

/// Names a case after its function.
#[macro_export]
macro_rules! cases {
    ($($function:ident),+ $(,)?) => {
        &[$($crate::Case { name: stringify!($function), run: $function }),+]
    };
}
