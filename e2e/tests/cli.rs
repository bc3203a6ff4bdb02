//! `bulkhead run` and its companions, in real VMs.

use std::{fs, io::Read, process::ExitCode, process::Stdio};

use anyhow::{Context, ensure};
use bulkhead_e2e::{Finished, Scratch, Terminal, cases, docker_archive, oci_archive, run};
use serde_json::json;
use sha2::{Digest, Sha256};

fn main() -> ExitCode {
    run(cases![
        output_and_exit_code_come_back,
        the_guest_has_its_own_kernel,
        options_reach_the_container,
        a_docker_archive_is_honoured,
        an_oci_archive_is_honoured,
        large_output_is_whole,
        standard_input_is_whole,
        without_i_standard_input_is_empty,
        volumes_are_shared,
        the_container_is_confined,
        limits_are_applied,
        a_missing_command_is_127,
        a_command_that_cannot_run_is_126,
        a_signal_ends_it_with_128_plus_n,
        a_terminal_works,
        ctrl_c_reaches_the_container,
        sigterm_reaches_the_container,
        exec_ps_and_kill_find_the_container,
        a_reader_that_leaves_ends_it_quietly,
        timing_is_told,
        check_is_in_plain_words,
    ])
}

fn sh(scratch: &Scratch, options: &[&str], script: &str) -> anyhow::Result<Finished> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let command = [&["run", "--rm"], options, &["--rootfs", &rootfs, "--", "/bin/sh", "-c", script]].concat();
    scratch.cli().run(&command)
}

fn output_and_exit_code_come_back(scratch: &Scratch) -> anyhow::Result<()> {
    let done = sh(scratch, &[], "echo out; echo err >&2; exit 42")?.expect(42)?.expect_error("err")?;
    ensure!(done.text() == "out", "{done:?}");
    Ok(())
}

fn the_guest_has_its_own_kernel(scratch: &Scratch) -> anyhow::Result<()> {
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let done = sh(scratch, &[], "uname -r; cat /proc/1/comm; ls /proc | grep -c '^[0-9]*$'")?.expect(0)?;
    let text = done.text();
    let mut lines = text.lines();
    ensure!(lines.next() != Some(host.trim()), "the host's kernel: {done:?}");
    ensure!(lines.next() == Some("sh"), "init is not the command: {done:?}");
    ensure!(lines.next().context("a count")?.parse::<u32>()? <= 4, "foreign processes are seen: {done:?}");
    Ok(())
}

fn options_reach_the_container(scratch: &Scratch) -> anyhow::Result<()> {
    let options = ["-e", "COLOUR=deep blue", "-w", "/tmp", "-u", "1000:2000"];
    let done = sh(scratch, &options, "echo $COLOUR; pwd; id -u; id -g")?.expect(0)?;
    ensure!(done.text() == "deep blue\n/tmp\n1000\n2000", "{done:?}");
    Ok(())
}

fn image_is_honoured(scratch: &Scratch, archive: &str) -> anyhow::Result<()> {
    let cli = scratch.cli();
    let done = cli.run(&["run", archive])?.expect(0)?;
    ensure!(done.text() == "hello from app in /home as 1000:1000 with two", "{done:?}");
    let done = cli.run(&["run", archive, "--", "ls", "/etc"])?.expect(0)?;
    ensure!(done.text().contains("hello from app"), "a command replaces Cmd, not Entrypoint: {done:?}");
    Ok(())
}

/// Two layers: busybox; then one file more and one file less.
fn make_image(
    scratch: &Scratch,
    write: fn(&std::path::Path, &str, &serde_json::Value, &[bulkhead_e2e::Layer]) -> anyhow::Result<()>,
) -> anyhow::Result<String> {
    let base = scratch.rootfs()?;
    let upper = scratch.path().join("upper");
    fs::create_dir_all(upper.join("etc"))?;
    fs::write(upper.join("etc/layer"), "two")?;
    fs::write(upper.join("etc/.wh.not-executable"), "")?;
    let script = "test ! -e /etc/not-executable && echo hello from $NAME in $PWD as $(id -u):$(id -g) with $(cat /etc/layer)";
    let config = json!({
        "Entrypoint": ["/bin/sh", "-c", script], "Cmd": ["ignored"],
        "Env": ["PATH=/bin", "NAME=app"], "WorkingDir": "/home", "User": "app",
    });
    let archive = scratch.path().join("image.tar");
    write(&archive, "localhost/app:1", &config, &[&base, &upper])?;
    Ok(archive.display().to_string())
}

fn a_docker_archive_is_honoured(scratch: &Scratch) -> anyhow::Result<()> {
    image_is_honoured(scratch, &make_image(scratch, docker_archive)?)
}

fn an_oci_archive_is_honoured(scratch: &Scratch) -> anyhow::Result<()> {
    image_is_honoured(scratch, &make_image(scratch, oci_archive)?)
}

fn large_output_is_whole(scratch: &Scratch) -> anyhow::Result<()> {
    let script = "dd if=/dev/zero bs=1048576 count=16 2>/dev/null | tr '\\0' 'x'; echo END";
    let done = sh(scratch, &[], script)?.expect(0)?;
    let mut expected = vec![b'x'; 16 << 20];
    expected.extend_from_slice(b"END\n");
    ensure!(done.stdout == expected, "{} bytes instead of {}", done.stdout.len(), expected.len());
    Ok(())
}

fn standard_input_is_whole(scratch: &Scratch) -> anyhow::Result<()> {
    let input: Vec<u8> =
        (0..4_000_000_u32).map(|number| number.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
    let rootfs = scratch.rootfs()?.display().to_string();
    let command = ["run", "-i", "--rootfs", &rootfs, "--", "sha256sum"];
    let done = scratch.cli().run_with_input(&command, &input)?.expect(0)?;
    let expected: String = Sha256::digest(&input).iter().map(|byte| format!("{byte:02x}")).collect();
    ensure!(done.text().starts_with(&expected), "{done:?}");
    Ok(())
}

fn without_i_standard_input_is_empty(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let done = scratch
        .cli()
        .run_with_input(&["run", "--rootfs", &rootfs, "--", "wc", "-c"], b"ignored")?
        .expect(0)?;
    ensure!(done.text() == "0", "{done:?}");
    Ok(())
}

fn volumes_are_shared(scratch: &Scratch) -> anyhow::Result<()> {
    let (work, fixed) = (scratch.path().join("work"), scratch.path().join("fixed"));
    fs::create_dir(&work)?;
    fs::create_dir(&fixed)?;
    fs::write(fixed.join("file"), "from the host")?;
    fs::write(scratch.path().join("single"), "one file")?;
    let (rw, ro, file) = (
        format!("{}:/data", work.display()),
        format!("{}:/fixed:ro", fixed.display()),
        format!("{}:/etc/single:ro", scratch.path().join("single").display()),
    );
    let script = "cat /fixed/file /etc/single; echo from the guest > /data/made; echo no > /fixed/file || echo refused";
    let done = sh(scratch, &["-v", &rw, "-v", &ro, "-v", &file], script)?.expect(0)?;
    ensure!(done.text() == "from the hostone filerefused", "{done:?}");
    ensure!(fs::read_to_string(work.join("made"))? == "from the guest\n", "the host sees no file");
    ensure!(fs::read_to_string(fixed.join("file"))? == "from the host", "a read-only volume was written");
    Ok(())
}

fn the_container_is_confined(scratch: &Scratch) -> anyhow::Result<()> {
    let script = "grep -E 'CapEff|Seccomp:|NoNewPrivs' /proc/self/status; hostname; cat /proc/keys | wc -c; \
                  echo 1 > /proc/sys/kernel/panic || echo proc-sys-refused; touch /sys/x || echo sys-refused; \
                  mknod /tmp/mem c 1 1 && (cat /tmp/mem >/dev/null || echo mem-refused); ls /dev";
    let done = sh(scratch, &[], script)?.expect(0)?;
    let text = done.text();
    for part in [
        "CapEff:\t00000000a80425fb",
        "proc-sys-refused",
        "sys-refused",
        "mem-refused",
        "null",
        "urandom",
        "ptmx",
    ] {
        ensure!(text.contains(part), "no {part:?}: {done:?}");
    }
    ensure!(!text.contains("kmsg"), "the guest's devices are seen: {done:?}");
    Ok(())
}

fn limits_are_applied(scratch: &Scratch) -> anyhow::Result<()> {
    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max; nproc";
    let done = sh(scratch, &["-m", "128m", "--cpus", "1.5"], script)?.expect(0)?;
    ensure!(done.text() == format!("{}\n150000 100000\n2", 128 << 20), "{done:?}");
    Ok(())
}

fn a_missing_command_is_127(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let run = |command: &str| scratch.cli().run(&["run", "--rootfs", &rootfs, "--", command]);
    run("nonesuch")?.expect(127)?.expect_error(r#"exec: "nonesuch": executable file not found in $PATH"#)?;
    run("/no/such")?
        .expect(127)?
        .expect_error(r#"exec: "/no/such": stat /no/such: no such file or directory"#)?;
    Ok(())
}

fn a_command_that_cannot_run_is_126(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let run = |command: &str| scratch.cli().run(&["run", "--rootfs", &rootfs, "--", command]);
    run("/etc/not-executable")?.expect(126)?.expect_error("permission denied")?;
    run("/etc")?.expect(126)?.expect_error(r#"exec: "/etc""#)?;
    Ok(())
}

fn a_signal_ends_it_with_128_plus_n(scratch: &Scratch) -> anyhow::Result<()> {
    sh(scratch, &[], "sh -c 'kill -KILL $$'; echo inner $?; exit 3")?.expect(3)?;
    Ok(())
}

fn a_terminal_works(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let command = scratch.cli().command(&["run", "-i", "-t", "--rootfs", &rootfs, "--", "/bin/sh"]);
    let mut terminal = Terminal::start(command, 30, 100)?;
    terminal.wait_for("# ")?;
    terminal.send("tty; stty size; echo $TERM\r")?;
    terminal.wait_for("/dev/")?;
    terminal.wait_for("30 100")?;
    terminal.resize(40, 120)?;
    terminal.send("sleep 1; stty size\r")?;
    terminal.wait_for("40 120")?;
    terminal.send("exit 5\r")?;
    terminal.finish()?.expect(5)?;
    Ok(())
}

fn ctrl_c_reaches_the_container(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let script = "trap 'echo interrupted; exit 9' INT; echo ready; while :; do sleep 1; done";
    let command =
        scratch.cli().command(&["run", "-i", "-t", "--rootfs", &rootfs, "--", "/bin/sh", "-c", script]);
    let mut terminal = Terminal::start(command, 24, 80)?;
    terminal.wait_for("ready")?;
    terminal.send("\x03")?;
    terminal.wait_for("interrupted")?;
    terminal.finish()?.expect(9)?;
    Ok(())
}

fn sigterm_reaches_the_container(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let script = "trap 'echo terminated; exit 8' TERM; echo ready; while :; do sleep 1; done";
    let mut child = scratch
        .cli()
        .command(&["run", "--rootfs", &rootfs, "--", "/bin/sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for_line(&mut child, "ready")?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let done = Finished::try_from(child)?.expect(8)?;
    ensure!(done.text() == "terminated", "{done:?}");
    Ok(())
}

/// Reads the child's output up to a line, byte by byte so that nothing more is taken.
fn wait_for_line(child: &mut std::process::Child, line: &str) -> anyhow::Result<()> {
    let output = child.stdout.as_mut().context("the output is piped")?;
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !String::from_utf8_lossy(&seen).lines().any(|seen| seen == line) || !seen.ends_with(b"\n") {
        let count = output.read(&mut byte)?;
        if count == 0 {
            let mut errors = String::new();
            child.stderr.as_mut().context("errors are piped")?.read_to_string(&mut errors)?;
            anyhow::bail!("the output ended without {line:?}: {errors}");
        }
        seen.push(byte[0]);
    }
    Ok(())
}

fn exec_ps_and_kill_find_the_container(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let cli = scratch.cli();
    let mut child = cli
        .command(&[
            "run",
            "--name",
            "box",
            "--rootfs",
            &rootfs,
            "--",
            "/bin/sh",
            "-c",
            "echo ready; exec sleep 1000",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for_line(&mut child, "ready")?;
    ensure!(cli.run(&["ps"])?.expect(0)?.text().contains("box"), "ps does not show it");
    let done = cli
        .run(&["exec", "box", "--", "/bin/sh", "-c", "echo inside; cat /proc/1/comm; exit 6"])?
        .expect(6)?;
    ensure!(done.text() == "inside\nsleep", "{done:?}");
    let done = cli.run_with_input(&["exec", "-i", "box", "--", "cat"], b"through")?.expect(0)?;
    ensure!(done.text() == "through", "{done:?}");
    let mut terminal = Terminal::start(cli.command(&["exec", "-i", "-t", "box", "--", "/bin/sh"]), 25, 90)?;
    terminal.wait_for("# ")?;
    terminal.send("stty size\r")?;
    terminal.wait_for("25 90")?;
    terminal.send("exit 2\r")?;
    terminal.finish()?.expect(2)?;
    cli.run(&["exec", "box", "--", "nonesuch"])?
        .expect(127)?
        .expect_error("executable file not found in $PATH")?;
    cli.run(&["exec", "nobody", "--", "true"])?.expect(125)?.expect_error("nobody")?;
    cli.run(&["run", "--name", "box", "--rootfs", &rootfs, "--", "true"])?
        .expect(125)?
        .expect_error("box")?;
    cli.run(&["kill", "-s", "KILL", "box"])?.expect(0)?;
    Finished::try_from(child)?.expect(137)?;
    ensure!(!cli.run(&["ps"])?.expect(0)?.text().contains("box"), "ps still shows it");
    Ok(())
}

fn a_reader_that_leaves_ends_it_quietly(scratch: &Scratch) -> anyhow::Result<()> {
    let rootfs = scratch.rootfs()?.display().to_string();
    let mut child = scratch
        .cli()
        .command(&["run", "--rootfs", &rootfs, "--", "yes"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    wait_for_line(&mut child, "y")?;
    drop(child.stdout.take());
    let done = Finished::try_from(child)?;
    ensure!(done.code != 0 && !done.stderr.contains("panicked"), "{done:?}");
    Ok(())
}

fn timing_is_told(scratch: &Scratch) -> anyhow::Result<()> {
    let done = sh(scratch, &["--timing"], "echo x")?.expect(0)?;
    let line = done
        .stderr
        .lines()
        .find_map(|line| line.strip_prefix("bulkhead: timing "))
        .context("no timing line")?;
    let timing: serde_json::Value = serde_json::from_str(line)?;
    for field in
        ["vmm_spawn_ms", "kernel_to_agent_ms", "agent_ready_ms", "container_created_ms", "first_output_ms"]
    {
        ensure!(timing["timing"][field].as_f64().is_some_and(|ms| ms > 0.0), "{field}: {line}");
    }
    Ok(())
}

fn check_is_in_plain_words(scratch: &Scratch) -> anyhow::Result<()> {
    let done = scratch.cli().run(&["check"])?.expect(0)?;
    let text = done.text().to_lowercase();
    ensure!(text.contains("qemu") && (text.contains("kvm") || text.contains("tcg")), "{done:?}");
    Ok(())
}
