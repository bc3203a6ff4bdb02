//! `containerd-shim-bulkhead-v2`: containerd's runtime `io.containerd.bulkhead.v2`.
//!
//! containerd runs it as `start` (make a server for a container or name the one of its pod) and as `delete` (clean up after
//! a server that died); without an action it is that server. One server is one pod: a VM and its containers.

mod annotations;
mod args;
mod bootstrap;
mod bundle;
mod delete;
mod error;
mod events;
mod forward;
mod info;
mod log;
mod metrics;
mod options;
mod pod;
mod process;
mod server;
mod socket;
mod start;
mod task;
mod task_api;

use std::{io::Write, process::ExitCode};

use args::{Action, Args};

fn main() -> ExitCode {
    let outcome = match Args::parse(std::env::args().skip(1)) {
        Ok(args) => act(&args).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    match outcome.and_then(|answer| std::io::stdout().write_all(&answer).map_err(|error| error.to_string())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "{}: {error}", env!("CARGO_PKG_NAME"));
            ExitCode::FAILURE
        }
    }
}

fn act(args: &Args) -> Result<Vec<u8>, bulkhead_sandbox::Error> {
    match args.action {
        Action::Start => start::run(args),
        Action::Delete => delete::run(args),
        Action::Serve => server::run(args).map(|()| Vec::new()),
        Action::Version => Ok(info::version().into_bytes()),
        Action::Info => Ok(info::info()),
    }
}
