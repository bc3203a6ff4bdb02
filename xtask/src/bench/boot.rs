//! How much a container costs on top of its VM: `bulkhead run` to the container's first output, against the bare kernel
//! until a busybox initramfs prints a line. The same kernel, QEMU and accelerator; in turns, so that what else happens on
//! the machine meets both.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_image::cpio::Archive;

use crate::foreground::Foreground;
use crate::process::command;
use crate::processes::{Process, tree};
use crate::progress::{heading, step};
use crate::rootfs;
use crate::workspace::Workspace;

/// How often.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How many times each is measured
    #[arg(short = 'n', long, default_value_t = 7)]
    rounds: usize,
}

impl Default for Arguments {
    fn default() -> Arguments {
        Arguments { rounds: 7 }
    }
}

/// Measures and prints medians and their ratio.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    heading("Time to the first output");
    let bench = Bench::new(workspace)?;
    // Not counted: it fills the page cache, and finds out whether this machine has KVM.
    let (_, vmm) = step("Warming up", || {
        let measured = bench.container()?;
        bench.bare(&measured.1)?;
        Ok(measured)
    })?;
    let (mut containers, mut bare) = (Vec::new(), Vec::new());
    for round in 1..=arguments.rounds.max(1) {
        step(&format!("Round {round} of {}", arguments.rounds), || {
            bare.push(bench.bare(&vmm)?);
            containers.push(bench.container()?.0);
            Ok(())
        })?;
    }
    let (container, kernel) = (Spread::of(containers), Spread::of(bare));
    println!("\nTime to the first output, {} rounds, {}", arguments.rounds, vmm.accelerator);
    println!("  {:<28} {container}", "bulkhead run");
    println!("  {:<28} {kernel}", "bare kernel, busybox /init");
    println!(
        "  {:<28} {:.2}",
        "ratio of the medians",
        container.median.as_secs_f64() / kernel.median.as_secs_f64()
    );
    Ok(())
}

struct Bench {
    bulkhead: PathBuf,
    kernel: PathBuf,
    rootfs: PathBuf,
    initramfs: PathBuf,
}

/// What the VM of `bulkhead run` was started with and the bare kernel's is to have too.
struct Vmm {
    program: PathBuf,
    accelerator: String,
    cpu: String,
    memory: String,
}

impl Bench {
    fn new(workspace: &Workspace) -> Result<Bench> {
        let directory = workspace.target.join("bench");
        let bench = Bench {
            bulkhead: workspace.prefix().join("bin/bulkhead"),
            kernel: workspace.prefix().join("share/bulkhead/vmlinuz"),
            rootfs: directory.join("rootfs"),
            initramfs: directory.join("initramfs.img"),
        };
        rootfs::make(&bench.rootfs)?;
        let mut archive = Archive::new();
        archive.file("bin/busybox", 0o755, fs::read(rootfs::busybox()?)?);
        archive.file(
            "init",
            0o755,
            b"#!/bin/busybox sh\necho first output\nexec /bin/busybox poweroff -f\n".to_vec(),
        );
        fs::write(&bench.initramfs, archive.to_bytes()?)?;
        Ok(bench)
    }

    /// From the start of `bulkhead run` to its container's first output. The container lives on until its VMM was seen.
    fn container(&self) -> Result<(Duration, Vmm)> {
        let mut container = Foreground::start(
            command(&self.bulkhead).args(["run", "--rm", "-i", "--rootfs"]).arg(&self.rootfs).args([
                "--",
                "/bin/sh",
                "-c",
                "echo first output; cat",
            ]),
        )?;
        let (time, line) = container.line()?;
        ensure!(line == "first output", "the container printed {line:?}");
        let vmm = Vmm::below(container.pid())?;
        container.finish()?;
        Ok((time, vmm))
    }

    /// From the start of QEMU to the first line of an initramfs that does nothing else.
    fn bare(&self, vmm: &Vmm) -> Result<Duration> {
        let mut qemu = Foreground::start(
            command(&vmm.program)
                .args([
                    "-machine",
                    &format!("q35,accel={}", vmm.accelerator),
                    "-cpu",
                    &vmm.cpu,
                    "-m",
                    &vmm.memory,
                ])
                .args([
                    "-nodefaults",
                    "-no-user-config",
                    "-no-reboot",
                    "-display",
                    "none",
                    "-serial",
                    "stdio",
                ])
                .arg("-kernel")
                .arg(&self.kernel)
                .arg("-initrd")
                .arg(&self.initramfs)
                .args(["-append", "console=ttyS0 quiet panic=-1"]),
        )?;
        let time = loop {
            // The firmware speaks before the kernel does.
            let (time, line) = qemu.line()?;
            if line.ends_with("first output") {
                break time;
            }
        };
        qemu.finish()?;
        Ok(time)
    }
}

impl Vmm {
    /// The VMM among the descendants of a process, by its command line.
    fn below(ancestor: u32) -> Result<Vmm> {
        let vmm = tree(ancestor).into_iter().find(Process::is_vmm);
        let vmm = vmm.context("`bulkhead run` has no VMM among its processes")?;
        let machine = vmm.argument("-machine").unwrap_or_default();
        let accelerator = machine.split(',').find_map(|part| part.strip_prefix("accel="));
        Ok(Vmm {
            program: fs::read_link(format!("/proc/{}/exe", vmm.pid))?,
            accelerator: accelerator.context("the VMM's command line names no accelerator")?.to_owned(),
            cpu: vmm.argument("-cpu").context("the VMM's command line names no CPU")?,
            memory: vmm.argument("-m").context("the VMM's command line names no memory")?,
        })
    }
}

/// The middle and the ends of several measurements.
struct Spread {
    median: Duration,
    least: Duration,
    most: Duration,
}

impl Spread {
    /// Of at least one.
    fn of(mut times: Vec<Duration>) -> Spread {
        times.sort();
        let at = |index: usize| times.get(index).copied().unwrap_or_default();
        Spread { median: at(times.len() / 2), least: at(0), most: at(times.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |time: Duration| time.as_secs_f64() * 1e3;
        write!(f, "median {:.0} ms  ({:.0} to {:.0})", ms(self.median), ms(self.least), ms(self.most))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_several() {
        let spread = Spread::of([3, 1, 9, 2, 5].map(Duration::from_millis).to_vec());
        assert_eq!(spread.to_string(), "median 3 ms  (1 to 9)");
    }
}
