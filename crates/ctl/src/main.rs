//! `bulkhead`: containers in small virtual machines, from a terminal and without a daemon.
//!
//! | file | |
//! |---|---|
//! | `run.rs`, `session.rs`, `conversation.rs` | a run: arguments, its life, the user and the process |
//! | `exec.rs`, `ps.rs`, `kill.rs`, `rm.rs` | what other invocations do to a run (`running.rs` finds it) |
//! | `check.rs`, `acceleration.rs`, `version.rs` | the host, and this program |
//! | `agent/` | the agent of a guest, called directly |
//! | `archive/` | image archives |
//! | `spec.rs`, `user.rs`, `volume.rs`, `limits.rs`, `name.rs` | from texts to an OCI configuration |
//! | `rundir.rs`, `tree.rs`, `inroot.rs` | directories: of a run, to remove, to resolve beneath |
//! | `lookup.rs` | a command that is not there |
//! | `streams.rs`, `tty.rs`, `signals.rs` | the user's end |
//! | `failure.rs`, `timing.rs` | the last lines |

mod acceleration;
mod agent;
mod archive;
mod check;
mod conversation;
mod exec;
mod failure;
mod inroot;
mod kill;
mod limits;
mod lookup;
mod name;
mod ps;
mod rm;
mod run;
mod rundir;
mod running;
mod session;
mod signals;
mod spec;
#[cfg(test)]
mod spec_tests;
mod streams;
mod timing;
mod tree;
mod tty;
mod user;
mod version;
mod volume;

use std::{process::ExitCode, time::Instant};

use clap::{Parser, Subcommand};

/// Runs containers inside small virtual machines.
#[derive(Debug, Parser)]
#[command(name = "bulkhead", version, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    /// Log what is done, to the standard error
    #[arg(long, global = true)]
    debug: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<run::Run>),
    Exec(exec::Exec),
    Ps(ps::Ps),
    Kill(kill::Kill),
    Rm(rm::Rm),
    Agent(agent::Agent),
    Check(check::Check),
    Version(version::Version),
}

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let level = if cli.debug { tracing::Level::DEBUG } else { tracing::Level::ERROR };
    tracing_subscriber::fmt().with_max_level(level).with_writer(std::io::stderr).init();
    // Modes are what images and callers say.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    let (result, failed): (_, fn(&anyhow::Error) -> u8) = match cli.command {
        Command::Run(args) => (run::run(*args, started), failure::code),
        Command::Exec(args) => (exec::run(args), failure::code),
        Command::Ps(args) => (ps::run(&args), |_| 1),
        Command::Kill(args) => (kill::run(&args), |_| 1),
        Command::Rm(args) => (rm::run(&args), |_| 1),
        Command::Agent(args) => (agent::run(args), |_| 1),
        Command::Check(args) => (check::run(&args), |_| 1),
        Command::Version(args) => (Ok(version::run(&args)), |_| 1),
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        streams::say(&failure::line(&error));
        failed(&error)
    }))
}

/// Prints help or a usage error; the code is docker's.
fn usage(error: &clap::Error) -> ExitCode {
    let _ = error.print();
    ExitCode::from(if error.use_stderr() { failure::OURS } else { 0 })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_arguments_agree_with_each_other() {
        Cli::command().debug_assert();
    }

    fn run(args: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["bulkhead", "run"].into_iter().chain(args.split_whitespace()))
    }

    #[test]
    fn a_run_has_one_source() {
        for good in [
            "i.tar",
            "-it i.tar -- sh -c x",
            "--rootfs d -- x -y",
            "i.tar --rm -e A=1 -e B -- x",
            "--debug i.tar",
        ] {
            assert!(run(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "-- x",
            "--rootfs d i.tar",
            "i.tar sh",
            "i.tar -m 1",
            "i.tar --cpus 0",
            "i.tar -u :",
            "i.tar -v /a",
            "i.tar --name x",
        ] {
            assert!(run(bad).is_err(), "{bad}");
        }
    }
}
