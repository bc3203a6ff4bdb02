//! `bulkhead-agent`: the first program of a guest, and the server of the agent API.
//!
//! ```text
//! main ─► boot (PID 1 only) ─► server ─► service/*: a file per family of requests
//!                                            │
//!                 reaper ◄─ process, stream ◄┴─ container ◄─ sandbox ─► storage/*, namespaces, oom
//! ```
//! One thread runs the requests; what blocks (the executor, mounts) runs on others.

mod boot;
mod config;
mod console;
mod container;
mod copy;
mod device;
mod diagnostics;
mod dispatch;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod hooks;
mod hotplug;
mod json;
mod log;
mod metrics;
mod mirror;
mod modules;
mod namespaces;
mod network;
mod oom;
mod passfd;
mod policy;
mod port;
mod process;
mod program;
mod reaper;
mod sandbox;
mod server;
mod service;
mod shared_mounts;
mod stats;
mod storage;
mod stream;
mod sync;
mod sys;
mod threads;
mod trace;
mod tree;
mod volume;
mod watcher;

use std::{
    io::Write,
    process::ExitCode,
    sync::{Arc, OnceLock},
};

use config::{Command, Config, USAGE};
use error::{During, Result};

/// The program's `main`.
pub fn main() -> ExitCode {
    bulkhead_executor::child_main();
    console::child_main();
    let times = boot::Times { started: boot::uptime(), listening: Arc::new(OnceLock::new()) };
    let init = boot::is_init();
    let mut ended = if init { run_as_init(times) } else { run_as_process(times) };
    if init {
        // Also after a failure: a first program that just returned would panic the kernel, and that buries the reason.
        report(&ended);
        ended = boot::power_off();
    }
    report(&ended);
    if ended.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn report(ended: &Result<()>) {
    if let Err(error) = ended {
        // Not the macro, which panics without a console.
        let _ = writeln!(std::io::stderr(), "bulkhead-agent: {error}");
    }
}

fn run_as_init(times: boot::Times) -> Result<()> {
    let image = boot::prepare()?;
    let (config, report) = Config::of_init(&image)?;
    let log = log::start(config.log_level, config.log_port != 0);
    report.log();
    let guest = Arc::new(boot::Guest::own());
    let finishing = Arc::clone(&guest);
    run(server::serve(config, guest, times, log, move || boot::finish(image, finishing)))
}

fn run_as_process(times: boot::Times) -> Result<()> {
    match Command::of_arguments()? {
        Command::Version => {
            println!("bulkhead-agent {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
        Command::Help => {
            println!("{USAGE}");
            Ok(())
        }
        Command::Serve(config, report) => {
            let log = log::start(config.log_level, false);
            report.log();
            run(server::serve(config, Arc::new(boot::Guest::plain()), times, log, || ()))
        }
    }
}

fn run(server: impl Future<Output = Result<()>>) -> Result<()> {
    let what = || "start the runtime".to_owned();
    threads::reserve().during(what)?;
    tokio::runtime::Builder::new_current_thread().enable_all().build().during(what)?.block_on(server)
}
