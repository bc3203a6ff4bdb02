//! `cargo xtask bench`: the figures that SPECIFICATION.md promises, measured on this machine.

mod agent;
mod boot;
mod containerd;
mod plain_agent;
mod size;

use anyhow::Result;

use crate::build::Prepare;
use crate::workspace::Workspace;

/// What to measure; without a word, everything.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    prepare: Prepare,
}

#[derive(clap::Subcommand)]
enum What {
    /// From `bulkhead run` to its first output, against the bare kernel
    Boot(boot::Arguments),
    /// The guest agent as a plain process: size, first answer, round trip, memory, descriptors
    Agent,
    /// Sizes of programs, memory and idle CPU time of what runs
    Size,
}

/// Measures.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    arguments.prepare.run(workspace)?;
    match &arguments.what {
        Some(What::Boot(arguments)) => boot::run(workspace, arguments),
        Some(What::Agent) => plain_agent::run(workspace),
        Some(What::Size) => size::run(workspace),
        None => {
            boot::run(workspace, &boot::Arguments::default())?;
            plain_agent::run(workspace)?;
            size::run(workspace)
        }
    }
}
