//! `cargo xtask test`: every check there is. One that fails does not keep the others from being made; the last line is
//! `N passed, N failed, N skipped`.

use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::progress::heading;
use crate::tally::{Counter, Tally};
use crate::workspace::Workspace;
use crate::{build, process, setup};

/// The package of the end-to-end tests.
const E2E: &str = "bulkhead-e2e";

/// Which tests.
#[derive(clap::Args, Default)]
pub(crate) struct Arguments {
    /// Only tests whose name contains this, and no lints
    filter: Option<String>,
}

/// Runs the checks and ends this program.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> ! {
    let mut checks = Checks { workspace, tally: Tally::default(), broken: Vec::new() };
    heading("Setup");
    if let Err(error) = setup::run(workspace) {
        checks.note("setup", &error);
        checks.finish();
    }
    let built = build::run(workspace, &build::Arguments::default());
    if let Err(error) = &built {
        checks.note("build", error);
    }
    if arguments.filter.is_none() {
        checks.lint("Formatting", "fmt", &["--all", "--check"]);
        checks.lint("Lints", "clippy", &["--workspace", "--all-targets", "--", "-D", "warnings"]);
    }
    let filter: Vec<&str> = arguments.filter.iter().map(String::as_str).collect();
    checks.unit_tests(&filter);
    match built {
        Ok(()) => {
            // A test program that is PID 1 has no arguments, and so no filter.
            if filter.is_empty() {
                checks.in_vm();
            }
            checks.end_to_end(&filter);
        }
        Err(_) => {
            eprintln!("The end-to-end tests are not run: there is nothing to test, see the build's errors.")
        }
    }
    checks.finish()
}

/// What has been found so far.
struct Checks<'a> {
    workspace: &'a Workspace,
    tally: Tally,
    /// Steps that failed, by name.
    broken: Vec<String>,
}

impl Checks<'_> {
    fn lint(&mut self, title: &str, subcommand: &str, arguments: &[&str]) {
        heading(title);
        if let Err(error) = process::run(self.workspace.cargo(subcommand).args(arguments)) {
            self.note(title, &error);
        }
    }

    /// Output is shown of tests that pass too: that is how those are found that skipped themselves.
    fn unit_tests(&mut self, filter: &[&str]) {
        heading("Unit tests");
        let mut cargo = self.workspace.cargo("test");
        let prefix = self.workspace.prefix();
        cargo
            .args(["--workspace", "--exclude", E2E, "--no-fail-fast"])
            .args(filter)
            .args(["--", "--show-output"])
            .env("BULKHEAD_PREFIX", &prefix)
            .env("BULKHEAD_TEST_KERNEL", prefix.join("share/bulkhead/vmlinuz"))
            .env("BULKHEAD_TEST_INITRAMFS", prefix.join("share/bulkhead/initramfs.img"))
            .env("BULKHEAD_TEST_AGENT", prefix.join("libexec/bulkhead/bulkhead-agent"))
            .env("BULKHEAD_TEST_BACKEND", prefix.join("libexec/bulkhead/bulkhead-backend"))
            // What needs a machine of its own gets one: `in_vm`.
            .env("BULKHEAD_TEST_VM_FOLLOWS", "1");
        if let Ok(package) = bulkhead_image::kernel::Package::find(&self.workspace.kernel()) {
            cargo.env("BULKHEAD_TEST_MODULES", package.modules);
        }
        match count(&mut cargo, &mut io::stdout()) {
            Ok((tally, ok)) => self.add("unit tests", tally, ok),
            Err(error) => self.note("unit tests", &error),
        }
    }

    /// The executor's tests once more, with a kernel and cgroups of their own.
    fn in_vm(&mut self) {
        let name = "Container tests in a VM";
        heading(name);
        let mut script = process::command(self.workspace.root.join("crates/executor/tests/in-vm.sh"));
        script.arg(self.workspace.prefix().join("share/bulkhead/vmlinuz")).current_dir(&self.workspace.root);
        match count(&mut script, &mut io::stdout()) {
            Ok((tally, ok)) => self.add(name, tally, ok),
            Err(error) => self.note(name, &error),
        }
    }

    fn end_to_end(&mut self, filter: &[&str]) {
        heading("End-to-end tests");
        let mut containerds = OsString::new();
        for directory in setup::containerd_directories(self.workspace) {
            if !containerds.is_empty() {
                containerds.push(":");
            }
            containerds.push(directory);
        }
        let mut cargo = self.workspace.cargo("test");
        cargo
            .args(["--package", E2E, "--no-fail-fast"])
            .args(filter)
            .env("BULKHEAD_PREFIX", self.workspace.prefix())
            .env("BULKHEAD_CONTAINERD", containerds);
        match count(&mut cargo, &mut io::stdout()) {
            Ok((tally, ok)) => self.add("end-to-end tests", tally, ok),
            Err(error) => self.note("end-to-end tests", &error),
        }
    }

    /// A command can fail without a failed test: when it does not compile, or dies.
    fn add(&mut self, name: &str, tally: Tally, ok: bool) {
        self.tally += tally;
        if !ok && tally.failed == 0 {
            self.tally.failed += 1;
        }
        if !ok || tally.failed > 0 {
            self.broken.push(name.to_owned());
        }
    }

    fn note(&mut self, name: &str, error: &anyhow::Error) {
        eprintln!("{name}: {error:#}");
        self.tally.failed += 1;
        self.broken.push(name.to_owned());
    }

    /// The last line is the tally, whatever happened.
    fn finish(self) -> ! {
        if !self.broken.is_empty() {
            eprintln!("\nFailed: {}", self.broken.join(", "));
        } else if self.tally.passed == 0 {
            eprintln!("\nNo test ran.");
        }
        println!("{}", self.tally);
        let good = self.tally.failed == 0 && self.tally.passed > 0;
        std::process::exit(if good { 0 } else { 1 })
    }
}

/// Runs tests, passes on what they print as they print it, and counts; and whether the command succeeded.
fn count(command: &mut Command, shown: &mut impl Write) -> Result<(Tally, bool)> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    let output = child.stdout.take().context("a pipe was asked for")?;
    let mut counter = Counter::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        writeln!(shown, "{line}")?;
        counter.add(&line);
    }
    Ok((counter.tally(), child.wait()?.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_while_passing_on() {
        let script = "echo 'test result: ok. 2 passed; 0 failed; 1 ignored'; echo '1 passed, 1 failed, 0 skipped'; exit 1";
        let mut shown = Vec::new();
        let (tally, ok) = count(Command::new("sh").args(["-c", script]), &mut shown).unwrap();
        assert!(shown.starts_with(b"test result: ok. 2 passed"));
        assert_eq!(tally, Tally { passed: 3, failed: 1, skipped: 1 });
        assert!(!ok);
    }

    #[test]
    fn a_failure_without_a_failed_test_counts() {
        let workspace = Workspace { root: "/".into(), target: "/".into() };
        let mut checks = Checks { workspace: &workspace, tally: Tally::default(), broken: Vec::new() };
        checks.add("a", Tally { passed: 1, ..Tally::default() }, true);
        checks.add("b", Tally::default(), false);
        checks.add("c", Tally { failed: 2, ..Tally::default() }, false);
        assert_eq!(checks.tally, Tally { passed: 1, failed: 3, skipped: 0 });
        assert_eq!(checks.broken, ["b", "c"]);
    }
}
