//! `cargo xtask demo`: a container in a VM, from nothing, with what it took.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::build::Prepare;
use crate::foreground::Foreground;
use crate::leftovers::{Belongings, network};
use crate::process::{self, command};
use crate::progress::{heading, step};
use crate::rootfs;
use crate::workspace::Workspace;

/// Sets up, builds, shows.
pub(crate) fn run(workspace: &Workspace, prepare: &Prepare) -> Result<()> {
    prepare.run(workspace)?;

    heading("A container in a virtual machine");
    let shown = show(workspace)?;
    println!("\n{shown}");
    Ok(())
}

/// What the demonstration showed.
struct Shown {
    host: String,
    guest: String,
    inside: String,
    exec: Duration,
    timing: Timing,
}

/// One container, a second command in it, and their end.
fn show(workspace: &Workspace) -> Result<Shown> {
    let bulkhead = workspace.prefix().join("bin/bulkhead");
    let root = workspace.target.join("demo/rootfs");
    let name = format!("demo-{}", std::process::id());
    step("Making a busybox root file system", || rootfs::make(&root))?;
    let before = network();
    let (mut container, guest) = step("Booting a VM and starting a container in it", || {
        let mut container = Foreground::start(
            command(&bulkhead)
                .args(["run", "--rm", "-i", "--timing", "--name", &name, "--rootfs"])
                .arg(&root)
                .args(["--", "/bin/sh", "-c", "uname -a; cat"]),
        )?;
        let (_, guest) = container.line()?;
        Ok((container, guest))
    })?;
    let belongings = Belongings::of(container.pid(), before)?;
    let started = Instant::now();
    let inside = step("Running a second command in the container", || {
        let script = "echo \"process $$, beside the container's first: $(cat /proc/1/comm)\"";
        process::output(command(&bulkhead).args(["exec", &name, "--", "/bin/sh", "-c", script]))
    })?;
    let exec = started.elapsed();
    let stderr = step("Ending the container and its VM", || {
        container.say("good bye\n")?;
        let (_, echo) = container.line()?;
        ensure!(echo == "good bye", "the container answered {echo:?} instead of what it was told");
        container.finish()
    })?;
    step("Looking for anything left behind", || belongings.are_gone())?;
    let timing = Timing::parse(&stderr)?;
    let host = process::output(command("uname").arg("-a"))?.trim().to_owned();
    Ok(Shown { host, guest, inside: inside.trim().to_owned(), exec, timing })
}

/// What `--timing` reports, in milliseconds.
#[derive(Debug, Deserialize)]
pub(crate) struct Timing {
    vmm_spawn_ms: Option<f64>,
    kernel_to_agent_ms: Option<f64>,
    agent_ready_ms: Option<f64>,
    container_created_ms: Option<f64>,
    first_output_ms: Option<f64>,
    teardown_ms: Option<f64>,
}

impl Timing {
    /// Finds the line in what `bulkhead run` wrote on its standard error.
    pub(crate) fn parse(stderr: &str) -> Result<Timing> {
        #[derive(Deserialize)]
        struct Line {
            timing: Timing,
        }
        let json = stderr.lines().find_map(|line| line.strip_prefix("bulkhead: timing "));
        let json = json.with_context(|| format!("`bulkhead run --timing` reported no timing:\n{stderr}"))?;
        Ok(serde_json::from_str::<Line>(json).context("cannot read the timing")?.timing)
    }
}

impl std::fmt::Display for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "host       {}", self.host)?;
        writeln!(f, "container  {}", self.guest)?;
        writeln!(f, "exec       {}\n", self.inside)?;
        let timing = &self.timing;
        let rows = [
            ("VMM spawn", timing.vmm_spawn_ms, "until the VMM process ran"),
            (
                "kernel to agent",
                timing.kernel_to_agent_ms,
                "from the guest's kernel to its agent, by the guest's clock",
            ),
            ("agent ready", timing.agent_ready_ms, "from the VMM to a sandbox that takes containers"),
            ("container created", timing.container_created_ms, "in the guest, not yet started"),
            ("first output", timing.first_output_ms, "since the command was entered"),
            ("exec round trip", Some(self.exec.as_secs_f64() * 1e3), "`bulkhead exec`, from start to end"),
            ("teardown", timing.teardown_ms, "container, VM and all that was made for them"),
        ];
        writeln!(f, "{:<18} {:>10}", "where time went", "ms")?;
        for (name, value, what) in rows {
            let value = value.map_or("-".to_owned(), |ms| format!("{ms:.0}"));
            writeln!(f, "{name:<18} {value:>10}  {what}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_timing_line_is_found() {
        let stderr = "bulkhead: no KVM here\nbulkhead: timing {\"timing\":{\"vmm_spawn_ms\":20.5,\"exit_ms\":null,\
                      \"first_output_ms\":3000,\"teardown_ms\":null}}\n";
        let timing = Timing::parse(stderr).unwrap();
        assert_eq!(timing.vmm_spawn_ms, Some(20.5));
        assert_eq!(timing.first_output_ms, Some(3000.0));
        assert_eq!(timing.teardown_ms, None);
        assert!(Timing::parse("bulkhead: alas\n").unwrap_err().to_string().contains("alas"));
    }
}
