//! The guest agent by itself: `crates/agent/benches/agent.rs` on the program of the install prefix.

use anyhow::Result;

use crate::process;
use crate::progress::heading;
use crate::workspace::Workspace;

/// Measures and prints.
pub(super) fn run(workspace: &Workspace) -> Result<()> {
    heading("The guest agent as a plain process");
    process::run(
        workspace
            .cargo("bench")
            .args(["--quiet", "--package", "bulkhead-agent", "--bench", "agent"])
            .env("BULKHEAD_BENCH_AGENT", workspace.prefix().join("libexec/bulkhead/bulkhead-agent")),
    )
}
