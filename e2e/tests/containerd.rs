//! The shim under a real containerd, driven by `ctr`: Debian's 1.6 (task API v2) and the later ones (v3).

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    process::{ExitCode, Stdio},
    sync::mpsc::channel,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bulkhead_e2e::{Containerd, Finished, Flavour, Scratch, Terminal, cases, run};

fn main() -> ExitCode {
    run(cases![
        run_on_1_6,
        run_on_1_7,
        run_on_2,
        a_terminal_task_works,
        exec_in_a_detached_task,
        exec_with_a_terminal,
        signals_and_exit_codes,
        pause_and_resume,
        metrics_are_exact,
        task_io_goes_to_fifos,
        task_io_goes_to_a_file,
        events_are_complete_and_in_order,
        a_missing_command_is_told,
        short_execs_lose_no_output,
        a_restarted_containerd_finds_its_task,
    ])
}

/// A hang is a failure, after this long.
const BOUND: Duration = Duration::from_secs(120);
const RUNTIME: &str = "io.containerd.bulkhead.v2";

fn with(scratch: &Scratch) -> anyhow::Result<Containerd> {
    Containerd::start(scratch, Flavour::installed()?)
}

fn ctr_run(
    containerd: &Containerd,
    options: &[&str],
    id: &str,
    command: &[&str],
) -> anyhow::Result<Finished> {
    containerd.ctr(&run_args(containerd, options, id, command))
}

fn run_args<'a>(
    containerd: &Containerd,
    options: &[&'a str],
    id: &'a str,
    command: &[&'a str],
) -> Vec<&'a str> {
    let mut args = vec!["run", "--runtime", RUNTIME];
    args.extend(options);
    args.extend([containerd.image(), id]);
    args.extend(command);
    args
}

/// Kills, waits for and deletes a detached task and its container.
fn remove(containerd: &Containerd, id: &str) -> anyhow::Result<()> {
    containerd.ctr(&["task", "rm", "--force", id])?.expect(0)?;
    containerd.ctr(&["container", "rm", id])?.expect(0)?;
    Ok(())
}

fn run_on(scratch: &Scratch, flavour: Flavour) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, flavour)?;
    let script = "echo out; echo err >&2; uname -r; exit 17";
    let done = ctr_run(&containerd, &["--rm"], "first", &["/bin/sh", "-c", script])?;
    let host = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let done = done.expect(17).with_context(|| containerd.log())?.expect_error("err")?;
    ensure!(done.text().starts_with("out\n") && !done.text().contains(host.trim()), "{done:?}");
    Ok(())
}

fn run_on_1_6(scratch: &Scratch) -> anyhow::Result<()> {
    run_on(scratch, Flavour::installed()?)
}

fn run_on_1_7(scratch: &Scratch) -> anyhow::Result<()> {
    run_on(scratch, Flavour::unpacked("1.7")?)
}

fn run_on_2(scratch: &Scratch) -> anyhow::Result<()> {
    run_on(scratch, Flavour::unpacked("2.")?)
}

fn a_terminal_task_works(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    let command = containerd.ctr_command(&run_args(&containerd, &["--rm", "-t"], "tty", &["/bin/sh"]));
    let mut terminal = Terminal::start(command, 33, 111)?;
    terminal.wait_for("# ")?;
    terminal.send("tty; stty size\r")?;
    terminal.wait_for("/dev/")?;
    terminal.wait_for("33 111")?;
    terminal.send("exit 4\r")?;
    terminal.finish()?.expect(4)?;
    Ok(())
}

fn detached(containerd: &Containerd, id: &str, command: &[&str]) -> anyhow::Result<()> {
    let done = ctr_run(containerd, &["-d", "--null-io"], id, command)?;
    done.expect(0).with_context(|| containerd.log()).map(drop)
}

fn exec_in_a_detached_task(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    detached(&containerd, "box", &["sleep", "1000"])?;
    let script = "echo in; cat /proc/1/comm; exit 5";
    let done =
        containerd.ctr(&["task", "exec", "--exec-id", "e1", "box", "/bin/sh", "-c", script])?.expect(5)?;
    ensure!(done.text() == "in\nsleep", "{done:?}");
    let listed = containerd.ctr(&["task", "ls"])?.expect(0)?;
    ensure!(listed.text().contains("RUNNING"), "{listed:?}");
    let listed = containerd.ctr(&["task", "ps", "box"])?.expect(0)?;
    ensure!(listed.text().lines().count() == 2, "ps shows one process, the VM's: {listed:?}");
    remove(&containerd, "box")
}

fn exec_with_a_terminal(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    detached(&containerd, "box", &["sleep", "1000"])?;
    let command = containerd.ctr_command(&["task", "exec", "-t", "--exec-id", "e1", "box", "/bin/sh"]);
    let mut terminal = Terminal::start(command, 20, 70)?;
    terminal.wait_for("# ")?;
    terminal.send("stty size\r")?;
    terminal.wait_for("20 70")?;
    terminal.send("exit 3\r")?;
    terminal.finish()?.expect(3)?;
    remove(&containerd, "box")
}

fn signals_and_exit_codes(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    let script = "trap 'exit 21' TERM; echo ready; while :; do sleep 1; done";
    for (signal, code) in [("SIGTERM", 21), ("SIGKILL", 137)] {
        let command = run_args(&containerd, &["--rm"], "box", &["/bin/sh", "-c", script]);
        let command = containerd.ctr_command(&command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = command?;
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().context("the output is piped")?).read_line(&mut line)?;
        ensure!(line == "ready\n", "{line:?}: {}", containerd.log());
        containerd.ctr(&["task", "kill", "-s", signal, "box"])?.expect(0)?;
        Finished::try_from(child)?.expect(code)?;
    }
    Ok(())
}

fn pause_and_resume(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    detached(&containerd, "box", &["/bin/sh", "-c", "while :; do echo x >> /tmp/beat; sleep 0.1; done"])?;
    let beats = || -> anyhow::Result<usize> {
        let count = "cat /tmp/beat 2>/dev/null | wc -l";
        let exec = ["task", "exec", "--exec-id", "count", "box", "/bin/sh", "-c", count];
        Ok(containerd.ctr(&exec)?.expect(0)?.text().parse()?)
    };
    let beyond = |last: usize| -> anyhow::Result<usize> {
        let start = Instant::now();
        loop {
            match beats()? {
                now if now > last => return Ok(now),
                now => ensure!(start.elapsed() < BOUND, "the heart does not beat: {now}"),
            }
        }
    };
    let before = beyond(0)?;
    containerd.ctr(&["task", "pause", "box"])?.expect(0)?;
    let listed = containerd.ctr(&["task", "ls"])?.expect(0)?;
    ensure!(listed.text().contains("PAUSED"), "{listed:?}");
    containerd.ctr(&["task", "resume", "box"])?.expect(0)?;
    beyond(before)?;
    remove(&containerd, "box")
}

fn metrics_are_exact(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    let options = ["-d", "--null-io", "--memory-limit", "134217728"];
    ctr_run(&containerd, &options, "box", &["sleep", "1000"])?.expect(0)?;
    let work = ["dd", "if=/dev/zero", "of=/dev/null", "bs=1M", "count=50"];
    containerd.ctr(&[&["task", "exec", "--exec-id", "work", "box"], &work[..]].concat())?.expect(0)?;
    let json = containerd.ctr(&["task", "metrics", "--format", "json", "box"])?.expect(0)?;
    let metrics: serde_json::Value = serde_json::from_str(&json.text())?;
    let number = |pointer: &str| metrics.pointer(pointer).and_then(serde_json::Value::as_f64);
    // The host's cgroup version decides the form.
    let limit = number("/memory/usage/limit").or_else(|| number("/memory/usage_limit"));
    ensure!(limit == Some(134_217_728.0), "the memory limit: {metrics}");
    let usage = number("/memory/usage/usage").or_else(|| number("/memory/usage"));
    ensure!(usage.is_some_and(|bytes| bytes > 0.0), "the memory usage: {metrics}");
    let cpu = number("/cpu/usage/total").or_else(|| number("/cpu/usage_usec"));
    ensure!(cpu.is_some_and(|time| time > 0.0), "the CPU time: {metrics}");
    ensure!(number("/pids/current") == Some(1.0), "the process count: {metrics}");
    remove(&containerd, "box")
}

fn task_io_goes_to_fifos(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    // `ctr run` without -t makes fifos and copies from and to its own streams.
    let mut child = containerd
        .ctr_command(&run_args(
            &containerd,
            &["--rm"],
            "box",
            &["/bin/sh", "-c", "read line; echo got $line; cat | wc -c"],
        ))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("standard input is piped")?;
    input.write_all(b"a line\n")?;
    input.write_all(&[b'x'; 300_000])?;
    drop(input);
    let done = Finished::try_from(child)?.expect(0)?;
    ensure!(done.text() == "got a line\n300000", "{done:?}");

    // Input that is at its end before the task has started.
    let mut child = containerd
        .ctr_command(&run_args(&containerd, &["--rm"], "box", &["cat"]))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    child.stdin.take().context("standard input is piped")?.write_all(b"early")?;
    let done = Finished::try_from(child)?.expect(0)?;
    ensure!(done.text() == "early", "{done:?}");
    Ok(())
}

fn task_io_goes_to_a_file(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    let log = containerd.path().join("task.log");
    let uri = format!("file://{}", log.display());
    let script = "echo to a file; echo errors too >&2; exec sleep 1000";
    ctr_run(&containerd, &["-d", "--log-uri", &uri], "box", &["/bin/sh", "-c", script])?.expect(0)?;
    let start = Instant::now();
    while fs::read_to_string(&log).unwrap_or_default() != "to a file\nerrors too\n" {
        ensure!(start.elapsed() < BOUND, "the log: {:?}", fs::read_to_string(&log));
        thread::sleep(Duration::from_millis(50));
    }
    remove(&containerd, "box")
}

fn events_are_complete_and_in_order(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    let mut listener =
        containerd.ctr_command(&["events"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    detached(&containerd, "box", &["sleep", "1000"])?;
    containerd.ctr(&["task", "exec", "--exec-id", "e1", "box", "true"])?.expect(0)?;
    containerd.ctr(&["task", "pause", "box"])?.expect(0)?;
    containerd.ctr(&["task", "resume", "box"])?.expect(0)?;
    remove(&containerd, "box")?;
    // The container's own deletion comes last: the shim has delivered everything before the task's is answered.
    let output = BufReader::new(listener.stdout.take().context("the output is piped")?);
    let (sender, lines) = channel();
    thread::spawn(move || output.lines().map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let mut text = String::new();
    while !text.contains("/containers/delete") {
        text.push_str(&lines.recv_timeout(BOUND).with_context(|| format!("no last event:\n{text}"))?);
        text.push('\n');
    }
    listener.kill()?;
    listener.wait()?;
    let topics: Vec<&str> = text
        .lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with("/tasks/")))
        .collect();
    let expected = [
        "/tasks/create",
        "/tasks/start",
        "/tasks/exec-added",
        "/tasks/exec-started",
        "/tasks/exit",
        "/tasks/delete",
        "/tasks/paused",
        "/tasks/resumed",
        "/tasks/exit",
        "/tasks/delete",
    ];
    ensure!(topics == expected, "{topics:?}\n{text}");
    Ok(())
}

fn a_missing_command_is_told(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    let done = ctr_run(&containerd, &["--rm"], "box", &["nonesuch"])?;
    ensure!(done.code != 0, "{done:?}");
    done.expect_error(r#"exec: "nonesuch": executable file not found in $PATH"#)?;
    containerd.ctr(&["container", "rm", "box"])?;
    detached(&containerd, "box", &["sleep", "1000"])?;
    let done = containerd.ctr(&["task", "exec", "--exec-id", "e1", "box", "nonesuch"])?;
    ensure!(done.code != 0, "{done:?}");
    done.expect_error("executable file not found in $PATH")?;
    remove(&containerd, "box")
}

fn short_execs_lose_no_output(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = with(scratch)?;
    detached(&containerd, "box", &["sleep", "1000"])?;
    for number in 0..40 {
        let (id, text) = (format!("e{number}"), format!("line {number}"));
        let done = containerd.ctr(&["task", "exec", "--exec-id", &id, "box", "echo", &text])?.expect(0)?;
        ensure!(done.text() == text, "{done:?}");
    }
    remove(&containerd, "box")
}

fn a_restarted_containerd_finds_its_task(scratch: &Scratch) -> anyhow::Result<()> {
    let mut containerd = with(scratch)?;
    detached(&containerd, "box", &["sleep", "1000"])?;
    containerd.restart(scratch)?;
    let listed = containerd.ctr(&["task", "ls"])?.expect(0)?;
    ensure!(listed.text().contains("RUNNING"), "{listed:?}");
    let done =
        containerd.ctr(&["task", "exec", "--exec-id", "e1", "box", "echo", "still here"])?.expect(0)?;
    ensure!(done.text() == "still here", "{done:?}");
    remove(&containerd, "box")
}
