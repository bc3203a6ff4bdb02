//! `cargo xtask`: what is done with this repository, a file per task.

mod bench;
mod build;
mod demo;
mod foreground;
mod fuzz;
mod leftovers;
mod process;
mod processes;
mod progress;
mod rootfs;
mod setup;
mod tally;
mod test;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use workspace::Workspace;

/// Tasks of the Bulkhead repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what this machine lacks for building and testing (Debian 12, as root); quick when nothing is missing
    Setup,
    /// Build programs, guest kernel and initramfs into target/bulkhead
    Build(build::Arguments),
    /// Show a container in a VM, from nothing, and where the time went
    Demo(build::Prepare),
    /// Check everything: setup, build, formatting, lints, unit tests, end-to-end tests
    Test(test::Arguments),
    /// Look for bytes that break a decoder (needs a nightly toolchain)
    Fuzz(fuzz::Arguments),
    /// Measure what SPECIFICATION.md promises
    Bench(bench::Arguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> anyhow::Result<()> {
    let workspace = Workspace::locate()?;
    match task {
        Task::Setup => setup::run(&workspace),
        Task::Build(arguments) => build::run(&workspace, &arguments),
        Task::Demo(prepare) => demo::run(&workspace, &prepare),
        Task::Fuzz(arguments) => fuzz::run(&workspace, &arguments),
        Task::Bench(arguments) => bench::run(&workspace, &arguments),
        Task::Test(arguments) => test::run(&workspace, &arguments),
    }
}
