//! Bad input and faults: a clear error, nothing left behind (the runner's census sees to the latter).

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bulkhead_e2e::{Cli, Containerd, Finished, Flavour, Scratch, cases, run};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::{Mode, SFlag, makedev, mknod},
    },
    unistd::Pid,
};

const RUNTIME: &str = "io.containerd.bulkhead.v2";

fn main() -> ExitCode {
    run(cases![
        a_missing_kernel_is_named,
        a_missing_initramfs_is_named,
        a_missing_qemu_is_named,
        an_image_that_is_none_is_refused,
        a_missing_rootfs_is_refused,
        a_wrong_key_is_named_with_the_right_one,
        a_guest_that_panics_is_told_with_its_console,
        a_guest_that_never_answers_is_told_with_its_console,
        a_killed_vm_ends_the_run,
        a_killed_backend_ends_the_run,
        a_guest_that_crashes_ends_the_task,
        a_killed_owner_leaves_nothing_running,
        a_killed_vm_ends_the_task,
        a_killed_shim_is_cleaned_up,
        an_unknown_namespace_is_refused,
        a_bundle_without_a_spec_is_refused,
    ])
}

fn with_config(scratch: &Scratch, text: &str) -> anyhow::Result<Cli> {
    Ok(scratch.cli().config(scratch.config(text)?))
}

fn fails(scratch: &Scratch, config: &str, parts: &[&str]) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let start = Instant::now();
    let mut done =
        with_config(scratch, config)?.run(&["run", "--rootfs", &rootfs, "--", "true"])?.expect(125)?;
    for part in parts {
        done = done.expect_error(part)?;
    }
    ensure!(start.elapsed() < Duration::from_secs(60), "a clear error should not take {:?}", start.elapsed());
    Ok(())
}

fn a_missing_kernel_is_named(scratch: &Scratch) -> anyhow::Result<()> {
    fails(scratch, "[hypervisor.qemu]\nkernel = \"/no/such/vmlinuz\"\n", &["kernel", "/no/such/vmlinuz"])
}

fn a_missing_initramfs_is_named(scratch: &Scratch) -> anyhow::Result<()> {
    fails(
        scratch,
        "[hypervisor.qemu]\ninitrd = \"/no/such/initramfs\"\n",
        &["initramfs", "/no/such/initramfs"],
    )
}

fn a_missing_qemu_is_named(scratch: &Scratch) -> anyhow::Result<()> {
    fails(scratch, "[hypervisor.qemu]\npath = \"/no/such/qemu\"\n", &["/no/such/qemu", "install"])
}

fn an_image_that_is_none_is_refused(scratch: &Scratch) -> anyhow::Result<()> {
    let file = scratch.path().join("image.tar");
    fs::write(&file, b"this is no image at all")?;
    scratch.cli().run(&["run", &file.display().to_string()])?.expect(125)?.expect_error("image.tar")?;
    Ok(())
}

fn a_missing_rootfs_is_refused(scratch: &Scratch) -> anyhow::Result<()> {
    let done = scratch.cli().run(&["run", "--rootfs", "/no/such/folder", "--", "true"])?;
    done.expect(125)?.expect_error("/no/such/folder")?;
    Ok(())
}

fn a_wrong_key_is_named_with_the_right_one(scratch: &Scratch) -> anyhow::Result<()> {
    fails(scratch, "[hypervisor.qemu]\nkernle = \"/x\"\n", &["kernle", "kernel"])
}

fn a_guest_that_panics_is_told_with_its_console(scratch: &Scratch) -> anyhow::Result<()> {
    // The kernel is told to run a first program that is not there: it panics, and QEMU ends.
    let config = "[hypervisor.qemu]\nkernel_params = \"rdinit=/no/such/init init=/no/such/init\"\n";
    fails(scratch, config, &["panic"])
}

fn a_guest_that_never_answers_is_told_with_its_console(scratch: &Scratch) -> anyhow::Result<()> {
    let initramfs = scratch.path().join("mute.img");
    mute_initramfs(&initramfs)?;
    // The bound is stretched tenfold under TCG.
    let config =
        format!("[hypervisor.qemu]\ninitrd = \"{}\"\n[agent]\ndial_timeout = 1\n", initramfs.display());
    fails(scratch, &config, &["did not answer within", "I shall not say more"])
}

/// An initramfs whose first program says one line and then nothing.
fn mute_initramfs(path: &Path) -> anyhow::Result<()> {
    let root = path.with_extension("root");
    fs::create_dir_all(root.join("bin"))?;
    fs::copy("/bin/busybox", root.join("bin/busybox"))?;
    fs::write(
        root.join("init"),
        "#!/bin/busybox sh\necho I shall not say more\nexec /bin/busybox sleep 1000000\n",
    )?;
    fs::set_permissions(root.join("init"), fs::Permissions::from_mode(0o755))?;
    // `console=` makes /dev/console the program's output, if there is a node for it.
    fs::create_dir(root.join("dev"))?;
    mknod(&root.join("dev/console"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o600), makedev(5, 1))?;
    let pack = format!("find . | /bin/busybox cpio -o -H newc > {}", path.display());
    let status =
        Command::new("/bin/sh").args(["-c", &pack]).current_dir(&root).stderr(Stdio::null()).status()?;
    ensure!(status.success(), "packing the initramfs failed");
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
    fs::set_permissions(path.parent().context("a folder")?, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Starts a container that sleeps, and waits until it runs.
fn sleeper(scratch: &Scratch) -> anyhow::Result<std::process::Child> {
    use std::io::{BufRead, BufReader};
    let rootfs = scratch.rootfs()?.display().to_string();
    let script = "echo ready; exec sleep 1000";
    let mut child = scratch
        .cli()
        .command(&["run", "--name", "box", "--rootfs", &rootfs, "--", "/bin/sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().context("piped")?).read_line(&mut line)?;
    ensure!(line == "ready\n", "{line:?}: {:?}", Finished::try_from(child)?);
    Ok(child)
}

/// The pids of a program by the beginning of its name; a case sees no processes but its own.
fn pids(name: &str) -> anyhow::Result<Vec<Pid>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process that is gone meanwhile has no name.
        if fs::read_to_string(entry.path().join("comm")).unwrap_or_default().starts_with(name) {
            found.push(Pid::from_raw(pid));
        }
    }
    Ok(found)
}

fn kill_one(name: &str) -> anyhow::Result<()> {
    let found = pids(name)?;
    ensure!(found.len() == 1, "{name}: {found:?}");
    kill(found[0], Signal::SIGKILL)?;
    Ok(())
}

fn a_killed_vm_ends_the_run(scratch: &Scratch) -> anyhow::Result<()> {
    let child = sleeper(scratch)?;
    kill_one("qemu-system")?;
    let done = Finished::try_from(child)?;
    ensure!(done.code == 137 || done.code == 255, "{done:?}");
    Ok(())
}

fn a_killed_backend_ends_the_run(scratch: &Scratch) -> anyhow::Result<()> {
    let child = sleeper(scratch)?;
    let found = pids("bulkhead-backen")?;
    ensure!(!found.is_empty(), "no backend process");
    for pid in found {
        kill(pid, Signal::SIGKILL).ok();
    }
    let done = Finished::try_from(child)?;
    ensure!(done.code == 137 || done.code == 255, "{done:?}");
    Ok(())
}

fn a_killed_owner_leaves_nothing_running(scratch: &Scratch) -> anyhow::Result<()> {
    let mut child = sleeper(scratch)?;
    child.kill()?;
    child.wait()?;
    let start = Instant::now();
    while !pids("qemu-system")?.is_empty() || !pids("bulkhead-backen")?.is_empty() {
        ensure!(start.elapsed() < Duration::from_secs(20), "the VM outlives its owner");
        std::thread::sleep(Duration::from_millis(50));
    }
    let cli = scratch.cli();
    ensure!(cli.run(&["ps"])?.expect(0)?.text().contains("box"), "what is left should be shown");
    cli.run(&["rm", "box"])?.expect(0)?;
    ensure!(!cli.run(&["ps"])?.expect(0)?.text().contains("box"), "it is still shown");
    Ok(())
}

fn detached(containerd: &Containerd, id: &str) -> anyhow::Result<()> {
    let run = ["run", "-d", "--null-io", "--runtime", RUNTIME, containerd.image(), id, "sleep", "1000"];
    containerd.ctr(&run)?.expect(0).with_context(|| containerd.log()).map(drop)
}

fn a_killed_vm_ends_the_task(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, Flavour::installed()?)?;
    detached(&containerd, "box")?;
    kill_one("qemu-system")?;
    until_stopped(&containerd, "box")?;
    // ctr tells the task's exit code in its log, not by its own.
    containerd.ctr(&["task", "rm", "box"])?.expect_error("exit code 137")?;
    containerd.ctr(&["container", "rm", "box"])?.expect(0)?;
    Ok(())
}

fn a_guest_that_crashes_ends_the_task(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, Flavour::installed()?)?;
    // With the kernel goes the agent; a container with every right may bring both down, and only those.
    let rights = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"];
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "cwd": "/", "args": ["/bin/sh", "-c", "echo c > /proc/sysrq-trigger"], "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
            "capabilities": {"bounding": rights, "effective": rights, "permitted": rights},
        },
        "root": {"path": scratch.rootfs()?.display().to_string()},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    });
    let done = run_spec(scratch, &containerd, &spec)?;
    ensure!(done.code == 137 || done.code == 255, "{done:?}");
    Ok(())
}

fn run_spec(
    scratch: &Scratch,
    containerd: &Containerd,
    spec: &serde_json::Value,
) -> anyhow::Result<Finished> {
    let file = scratch.path().join("config.json");
    fs::write(&file, spec.to_string())?;
    containerd.ctr(&["run", "--rm", "--runtime", RUNTIME, "--config", &file.display().to_string(), "box"])
}

fn until_stopped(containerd: &Containerd, id: &str) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let listed = containerd.ctr(&["task", "ls"])?.text();
        match listed.lines().find(|line| line.starts_with(id)) {
            Some(line) if !line.contains("STOPPED") => {
                ensure!(
                    start.elapsed() < Duration::from_secs(60),
                    "{id} never stops: {listed}\n{}",
                    containerd.log()
                );
            }
            _ => return Ok(()),
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn a_killed_shim_is_cleaned_up(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, Flavour::installed()?)?;
    detached(&containerd, "box")?;
    kill_one("containerd-shim")?;
    until_stopped(&containerd, "box")?;
    containerd.ctr(&["task", "rm", "--force", "box"])?;
    containerd.ctr(&["container", "rm", "box"])?.expect(0)?;
    Ok(())
}

fn an_unknown_namespace_is_refused(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, Flavour::installed()?)?;
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {"cwd": "/", "args": ["true"], "user": {"uid": 0, "gid": 0}},
        "root": {"path": scratch.rootfs()?.display().to_string()},
        "linux": {"namespaces": [{"type": "nonesuch"}]},
    });
    let done = run_spec(scratch, &containerd, &spec)?;
    ensure!(done.code != 0, "{done:?}");
    done.expect_error("nonesuch")?;
    Ok(())
}

fn a_bundle_without_a_spec_is_refused(scratch: &Scratch) -> anyhow::Result<()> {
    let bundle = scratch.path().join("bundle");
    fs::create_dir(&bundle)?;
    let shim = scratch.prefix().bin().join("containerd-shim-bulkhead-v2");
    let output = Command::new(shim)
        .args(["-namespace", "test", "-address", "/no/such.sock", "-id", "box", "start"])
        .current_dir(&bundle)
        .stdin(Stdio::null())
        .output()?;
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(!output.status.success() && text.contains("config.json"), "{output:?}");
    Ok(())
}
