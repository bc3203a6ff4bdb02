//! `bulkhead-backend`: serves one vhost-user device to one VMM, and ends with it.
//!
//! Exit codes: 0 the VMM has disconnected, 1 the device failed, 2 the command line is wrong.

mod args;
mod fs;
mod logger;
mod privileges;
mod sys;
mod vhost_user;
mod vsock;

use std::{os::unix::net::UnixListener, process::ExitCode};

use anyhow::Context;
use args::Command;

fn main() -> ExitCode {
    let command = match args::parse(std::env::args_os().skip(1)) {
        Ok(command) => command,
        Err(error) => {
            eprintln!("bulkhead-backend: {error}\n{}", args::USAGE);
            return ExitCode::from(2);
        }
    };
    logger::start();
    match run(command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bulkhead-backend: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Vsock { fd, uds_fd, uds, cid } => vsock::serve(vsock::Config {
            vmm: listener("--fd", fd)?,
            programs: listener("--uds-fd", uds_fd)?,
            uds,
            cid,
        }),
        Command::Fs { fd, shared_dir, cache } => {
            fs::serve(fs::Config { vmm: listener("--fd", fd)?, shared_dir, cache })
        }
        Command::Help => {
            println!("{}", args::USAGE);
            Ok(())
        }
    }
}

fn listener(option: &str, fd: i32) -> anyhow::Result<UnixListener> {
    let fd = sys::take_fd(fd).with_context(|| format!("cannot use descriptor {fd} ({option})"))?;
    Ok(UnixListener::from(fd))
}
