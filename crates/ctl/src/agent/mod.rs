//! `bulkhead agent`: talks to the agent of a guest directly, ours or any other that offers the same API.
//!
//! | file | |
//! |---|---|
//! | `call.rs` | one call, from and to JSON |
//! | `record.rs`, `replay.rs`, `comparison.rs` | a proxy that writes every call to a file; the same calls again, compared |
//! | `trace.rs` | that file's lines |
//! | `address.rs`, `api.rs`, `json.rs`, `frames.rs` | where an agent is, its methods, their messages, their bytes |

mod address;
mod api;
mod call;
mod comparison;
mod frames;
mod json;
mod record;
mod replay;
mod trace;

use anyhow::{Context as _, Result};
use clap::{Args, Subcommand};

/// Calls the agent of a guest, records the calls of others, and replays them.
#[derive(Debug, Args)]
pub(crate) struct Agent {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Call(call::Call),
    Record(record::Record),
    Replay(replay::Replay),
}

/// Does it; 0 is success.
pub(crate) fn run(agent: Agent) -> Result<u8> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let code = match agent.command {
        Command::Call(call) => runtime.block_on(call::run(&call)),
        Command::Record(record) => runtime.block_on(record::run(record)),
        Command::Replay(replay) => runtime.block_on(replay::run(&replay)),
    };
    runtime.shutdown_background();
    code
}
