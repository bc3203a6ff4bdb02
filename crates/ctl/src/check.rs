//! `bulkhead check`: whether this host can run VMs, with what, and what is missing.

use std::{fs, io::Write as _, path::Path, process::Command};

use anyhow::{Context as _, Result};
use bulkhead_hypervisor::{Accel, AccelPolicy, resolve_accel};
use bulkhead_sandbox::{Config, Hypervisor};
use clap::Args;
use serde::Serialize;

use crate::acceleration;

/// The oldest QEMU whose command line and vhost-user devices are used here.
const OLDEST_QEMU: (u32, u32) = (7, 2);
/// The VM's memory is not all that it takes: QEMU itself, the devices, page tables.
const QEMU_OVERHEAD_MIB: u64 = 128;

/// Says whether this host can run VMs, how fast, and what is missing.
///
/// Exits with 0 when it can, with 1 otherwise.
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How good a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Grade {
    /// As it should be.
    Ok,
    /// Works, but slower or with less.
    Note,
    /// Nothing can run.
    Missing,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    grade: Grade,
    found: String,
    /// What to do about it.
    remedy: Option<String>,
}

#[derive(Debug, Serialize)]
struct Report {
    usable: bool,
    accel: Option<Accel>,
    summary: String,
    findings: Vec<Finding>,
}

/// Looks, prints, and returns 0 when VMs can be run.
pub(crate) fn run(args: &Check) -> Result<u8> {
    let config = Config::load()?;
    let report = look(&config)?;
    let text = if args.json { serde_json::to_string_pretty(&report)? + "\n" } else { text(&report) };
    let _ = std::io::stdout().write_all(text.as_bytes());
    Ok(u8::from(!report.usable))
}

fn look(config: &Config) -> Result<Report> {
    let mut findings = vec![root()];
    if let Hypervisor::Local { agent } = &config.hypervisor {
        findings.push(file("guest agent", agent, "run `cargo xtask build`"));
        return Ok(conclude(None, findings));
    }
    findings.push(qemu(&config.vmm));
    findings.push(file(
        "guest kernel",
        &config.kernel,
        "run `cargo xtask build`, or name one as `kernel` in the configuration",
    ));
    findings.push(file(
        "guest initramfs",
        &config.initramfs,
        "run `cargo xtask build`, or name one as `initrd` in the configuration",
    ));
    findings.push(file(
        "device backend",
        &config.backend,
        "install bulkhead-backend beside this program, in libexec/bulkhead",
    ));
    findings
        .push(memory(config.default_memory_mib, &fs::read_to_string("/proc/meminfo").unwrap_or_default()));
    let complete = findings.iter().all(|finding| finding.grade != Grade::Missing);
    let accel = if complete { Some(acceleration(config, &mut findings)?) } else { None };
    findings.push(vsock());
    Ok(conclude(accel.flatten(), findings))
}

fn conclude(accel: Option<Accel>, findings: Vec<Finding>) -> Report {
    let missing: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.grade == Grade::Missing)
        .map(|finding| finding.what)
        .collect();
    let summary = match accel {
        _ if !missing.is_empty() => format!("This host cannot run VMs yet: see {}.", missing.join(", ")),
        Some(Accel::Kvm) => "This host can run VMs, with hardware virtualization (KVM).".to_owned(),
        Some(Accel::Tcg) => {
            "This host can run VMs, without hardware virtualization (TCG): everything works, about ten times slower.".to_owned()
        }
        None => "The configuration runs the agent without a VM: for tests only, it isolates nothing.".to_owned(),
    };
    Report { usable: missing.is_empty(), accel, summary, findings }
}

fn ok(what: &'static str, found: String) -> Finding {
    Finding { what, grade: Grade::Ok, found, remedy: None }
}

fn missing(what: &'static str, found: String, remedy: &str) -> Finding {
    Finding { what, grade: Grade::Missing, found, remedy: Some(remedy.to_owned()) }
}

fn note(what: &'static str, found: String, remedy: &str) -> Finding {
    Finding { what, grade: Grade::Note, found, remedy: Some(remedy.to_owned()) }
}

fn root() -> Finding {
    if rustix::process::geteuid().is_root() {
        ok("permissions", "running as root".to_owned())
    } else {
        missing("permissions", "not running as root".to_owned(), "run bulkhead with sudo")
    }
}

fn qemu(path: &Path) -> Finding {
    const WHAT: &str = "QEMU";
    let output = match Command::new(path).arg("--version").output() {
        Ok(output) => output,
        Err(error) => {
            let remedy = "install it: `apt-get install qemu-system-x86`, `dnf install qemu-system-x86-core`";
            return missing(WHAT, format!("{}: {error}", path.display()), remedy);
        }
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let first = text.lines().next().unwrap_or_default().trim();
    match version(first) {
        Some(found) if found >= OLDEST_QEMU => ok(WHAT, format!("{}, {first}", path.display())),
        Some(_) => missing(WHAT, format!("{}, {first}", path.display()), "install version 7.2 or newer"),
        None => missing(
            WHAT,
            format!("{} does not say its version: {first:?}", path.display()),
            "install version 7.2 or newer",
        ),
    }
}

/// `QEMU emulator version 7.2.15 (Debian ...)`
fn version(line: &str) -> Option<(u32, u32)> {
    let mut words = line.split_whitespace();
    words.find(|word| *word == "version")?;
    let mut numbers = words.next()?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

fn file(what: &'static str, path: &Path, remedy: &str) -> Finding {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => ok(what, format!("{} ({} KiB)", path.display(), meta.len() / 1024)),
        Ok(_) => missing(what, format!("{} is not a file", path.display()), remedy),
        Err(error) => missing(what, format!("{}: {error}", path.display()), remedy),
    }
}

fn memory(default_mib: u64, meminfo: &str) -> Finding {
    const WHAT: &str = "memory";
    let available = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let available: Option<u64> = available.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let needed = default_mib + QEMU_OVERHEAD_MIB;
    match available.map(|kib| kib / 1024) {
        Some(mib) if mib >= needed => ok(WHAT, format!("{mib} MiB available; a VM takes up to {needed} MiB")),
        Some(mib) => note(
            WHAT,
            format!("{mib} MiB available; a VM that uses all of its memory takes {needed} MiB"),
            "run with -m, or lower default_memory in the configuration",
        ),
        None => note(WHAT, "unknown".to_owned(), "mount /proc"),
    }
}

/// Adds the finding on KVM, booting a probe guest if this host has not been judged yet.
fn acceleration(config: &Config, findings: &mut Vec<Finding>) -> Result<Option<Accel>> {
    const WHAT: &str = "acceleration";
    acceleration::announce_probe(config);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime")?;
    let (accel, finding) = match runtime.block_on(resolve_accel(&acceleration::query(config))) {
        Ok(verdict) if verdict.accel == Accel::Kvm => {
            (Some(Accel::Kvm), ok(WHAT, format!("KVM: {}", verdict.reason)))
        }
        Ok(verdict) => {
            (Some(Accel::Tcg), note(WHAT, format!("TCG: {}", verdict.reason), tcg_remedy(config.accel)))
        }
        Err(error) => (
            None,
            missing(WHAT, error.to_string(), "set accel to \"auto\" in the configuration, or make KVM work"),
        ),
    };
    findings.push(finding);
    Ok(accel)
}

fn tcg_remedy(policy: AccelPolicy) -> &'static str {
    if policy == AccelPolicy::Tcg {
        "for speed, set accel to \"auto\" in the configuration"
    } else if Path::new("/dev/kvm").exists() {
        "for speed, use a host whose KVM works: here even a plain guest kernel does not come up under it (nested virtualization?)"
    } else {
        "for speed, enable virtualization in the firmware or for this cloud instance, and load kvm_intel or kvm_amd"
    }
}

fn vsock() -> Finding {
    const WHAT: &str = "vsock";
    match fs::File::options().read(true).write(true).open("/dev/vhost-vsock") {
        Ok(_) => ok(WHAT, "/dev/vhost-vsock".to_owned()),
        // Equivalent for the guest, so nothing to be done about.
        Err(error) => ok(WHAT, format!("our own device, since /dev/vhost-vsock cannot be used ({error})")),
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let mark = match finding.grade {
            Grade::Ok => "ok",
            Grade::Note => "note",
            Grade::Missing => "MISSING",
        };
        text += &format!("{mark:8} {:16} {}\n", finding.what, finding.found);
        if let Some(remedy) = &finding.remedy {
            text += &format!("{:25} {remedy}\n", "");
        }
    }
    text + "\n" + &report.summary + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        assert_eq!(version("QEMU emulator version 7.2.15 (Debian 1:7.2+dfsg-7)"), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(version("something else"), None);
        assert!((6, 9) < OLDEST_QEMU && (10, 0) > OLDEST_QEMU);
    }

    #[test]
    fn a_missing_part_decides() {
        let findings = vec![ok("a", String::new()), missing("QEMU", String::new(), "install it")];
        let report = conclude(None, findings);
        assert!(!report.usable && report.summary.contains("QEMU"));
        assert!(text(&report).contains("install it"));
        let report = conclude(Some(Accel::Tcg), vec![note("acceleration", String::new(), "")]);
        assert!(report.usable && report.summary.contains("slower"));
    }

    #[test]
    fn memory_is_a_matter_of_degree() {
        assert_eq!(memory(1024, "MemTotal: 9 kB\nMemAvailable:  8000000 kB\n").grade, Grade::Ok);
        assert_eq!(memory(1024, "MemAvailable:  800000 kB\n").grade, Grade::Note);
        assert_eq!(memory(1024, "").grade, Grade::Note);
    }

    #[test]
    fn files() {
        assert_eq!(file("x", Path::new("/no/such"), "r").grade, Grade::Missing);
        assert_eq!(file("x", Path::new("/"), "r").grade, Grade::Missing);
        assert_eq!(file("x", Path::new("/proc/self/stat"), "r").grade, Grade::Ok);
    }
}
