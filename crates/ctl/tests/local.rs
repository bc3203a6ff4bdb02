//! Whole runs on the `local` hypervisor: the agent as a plain process, everything else as with a VM.
//!
//! They need root, busybox, and the agent built beside the program (`cargo build --workspace`).

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use fixture::{Outcome, Place, is_root};

const APPLETS: [&str; 12] =
    ["sh", "cat", "echo", "id", "sleep", "yes", "sha256sum", "head", "pwd", "env", "true", "kill"];

fn agent() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_bulkhead")).with_file_name("bulkhead-agent")
}

/// A place with a busybox root file system, or `None` where that cannot be.
fn place(test: &str) -> Option<Place> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    let missing = match busybox {
        None => Some("busybox-static"),
        Some(_) if !agent().exists() => Some("the agent beside the program; run `cargo build --workspace`"),
        Some(_) => None,
    };
    if let Some(missing) = missing {
        eprintln!("SKIPPED {test}: needs {missing}");
        return None;
    }
    if !is_root(test) {
        return None;
    }
    let agent = format!("[hypervisor.local]\nagent = \"{}\"", agent().display());
    let place = Place::new(&agent, "hypervisor_name = \"local\"");
    for dir in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(place.path("rootfs").join(dir)).unwrap();
    }
    fs::copy(busybox?, place.path("rootfs/bin/busybox")).unwrap();
    for applet in APPLETS {
        symlink("busybox", place.path("rootfs/bin").join(applet)).unwrap();
    }
    fs::write(
        place.path("rootfs/etc/passwd"),
        "root:x:0:0::/root:/bin/sh\napp:x:1000:100::/home/app:/bin/sh\n",
    )
    .unwrap();
    fs::write(place.path("rootfs/etc/group"), "users:x:100:\nextra:x:200:app\n").unwrap();
    Some(place)
}

fn run(place: &Place, options: &[&str], command: &[&str]) -> Outcome {
    place.run(&[&["run", "--rootfs", "rootfs"], options, &["--"], command].concat())
}

/// A run in the background that has printed its first line.
fn background(place: &Place, name: &str, script: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut command = place.command(&["run", "--rootfs", "rootfs", "--name", name, "--", "sh", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    (child, stdout)
}

#[test]
fn codes_output_and_environment() {
    let Some(place) = place("codes_output_and_environment") else { return };
    let outcome = run(
        &place,
        &["-e", "A=1", "-w", "/etc", "-u", "app"],
        &["sh", "-c", "id; pwd; echo $A $HOME; echo err >&2; exit 42"],
    );
    assert_eq!(outcome.code, 42);
    assert!(outcome.stdout.contains("uid=1000(app) gid=100(users) groups=200(extra)"), "{outcome:?}");
    assert!(outcome.stdout.ends_with("/etc\n1 /home/app\n"), "{outcome:?}");
    assert_eq!(outcome.stderr, "err\n");
    assert_eq!(run(&place, &[], &["sh", "-c", "sh -c 'kill -15 $$'; exit $?"]).code, 143);
    run(&place, &[], &["nothing"]).fails(127, &["exec: \"nothing\": executable file not found in $PATH"]);
    run(&place, &[], &["/nothing"]).fails(127, &["stat /nothing: no such file or directory"]);
    run(&place, &[], &["/etc/passwd"]).fails(126, &["exec: \"/etc/passwd\": permission denied"]);
    run(&place, &["-u", "nobody"], &["id"]).fails(125, &["user \"nobody\"", "/etc/passwd"]);
    place.is_clean();
}

#[test]
fn standard_input_is_passed_on_only_when_asked() {
    let Some(place) = place("standard_input_is_passed_on_only_when_asked") else { return };
    for (options, expected) in [(&["-i"][..], "text"), (&[], "")] {
        let mut command = place.command(&[&["run", "--rootfs", "rootfs"], options, &["--", "cat"]].concat());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        // Without -i nobody reads it.
        let _ = child.stdin.take().unwrap().write_all(b"text");
        let outcome = Outcome::of(child.wait_with_output().unwrap());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (0, expected));
    }
    place.is_clean();
}

#[test]
fn large_output_is_complete() {
    let Some(place) = place("large_output_is_complete") else { return };
    let mut content = Vec::new();
    fs::File::open("/dev/urandom").unwrap().take(20_000_000).read_to_end(&mut content).unwrap();
    fs::write(place.path("rootfs/big"), &content).unwrap();
    let output = place.command(&["run", "--rootfs", "rootfs", "--", "cat", "/big"]).output().unwrap();
    assert!(output.stdout == content, "{} of {} bytes, or others", output.stdout.len(), content.len());
    place.is_clean();
}

#[test]
fn a_reader_that_goes_ends_the_run_quietly() {
    let Some(place) = place("a_reader_that_goes_ends_the_run_quietly") else { return };
    let mut command = place.command(&["run", "--rootfs", "rootfs", "--", "yes"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut some = [0; 2];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let outcome = Outcome::of(child.wait_with_output().unwrap());
    assert_eq!((outcome.code, outcome.stderr.as_str()), (141, ""));
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = place.command(&["run", "--rootfs", "rootfs", "--", "yes"]).stdout(full).output().unwrap();
    Outcome::of(output).fails(125, &["write to standard output", "No space left"]);
    place.is_clean();
}

#[test]
fn others_find_a_run_by_its_name() {
    let Some(place) = place("others_find_a_run_by_its_name") else { return };
    let script = "trap 'echo term; exit 7' TERM; echo up; while true; do sleep 0.1; done";
    let (mut child, mut stdout) = background(&place, "web", script);
    let ps: serde_json::Value = serde_json::from_str(&place.run(&["ps", "--json"]).stdout).unwrap();
    assert_eq!((ps[0]["name"].as_str(), ps[0]["status"].as_str()), (Some("web"), Some("running")));
    let exec = place.run(&[
        "exec",
        "-e",
        "B=2",
        "-u",
        "app",
        "web",
        "--",
        "sh",
        "-c",
        "id -u; echo $B $HOME; exit 4",
    ]);
    assert_eq!((exec.code, exec.stdout.as_str()), (4, "1000\n2 /home/app\n"));
    place.run(&["exec", "web", "--", "nothing"]).fails(127, &["executable file not found"]);
    run(&place, &["--name", "web"], &["true"]).fails(125, &["the name web is in use"]);
    place.run(&["rm", "web"]).fails(1, &["web is running", "rm -f"]);
    assert_eq!(place.run(&["kill", "-s", "TERM", "web"]).code, 0);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((rest.as_str(), child.wait().unwrap().code()), ("term\n", Some(7)));
    place.is_clean();
}

#[test]
fn an_owner_that_is_killed_leaves_what_rm_removes() {
    let Some(place) = place("an_owner_that_is_killed_leaves_what_rm_removes") else { return };
    let (mut child, _stdout) = background(&place, "dead", "echo up; sleep 100");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(place.run(&["ps"]).stdout.contains("stale"));
    place.run(&["exec", "dead", "--", "true"]).fails(125, &["dead is dead", "bulkhead rm dead"]);
    // Its name is free again, and the next run of that name clears up.
    assert_eq!(run(&place, &["--name", "dead"], &["true"]).code, 0);
    place.is_clean();
    let (mut child, _stdout) = background(&place, "dead", "echo up; sleep 100");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(place.run(&["rm", "dead"]).code, 0);
    place.is_clean();
    let (mut child, _stdout) = background(&place, "alive", "echo up; sleep 100");
    assert_eq!(place.run(&["rm", "-f", "alive"]).code, 0);
    assert_eq!(child.wait().unwrap().code(), Some(137));
    place.is_clean();
}

#[test]
fn signals_reach_the_container_and_the_third_forces_the_end() {
    let Some(place) = place("signals_reach_the_container_and_the_third_forces_the_end") else { return };
    let send = |child: &Child, signal: &str| {
        assert!(
            Command::new("kill").args(["-s", signal, &child.id().to_string()]).status().unwrap().success()
        );
    };
    let script = "trap 'echo int' INT; echo up; while true; do sleep 0.1; done";
    let (mut child, mut stdout) = background(&place, "sig", script);
    for _ in 0..2 {
        send(&child, "INT");
        let mut line = String::new();
        stdout.read_line(&mut line).unwrap();
        assert_eq!(line, "int\n");
    }
    send(&child, "INT");
    assert_eq!(child.wait().unwrap().code(), Some(137));
    place.is_clean();
}

#[test]
fn timing_is_one_line_of_json() {
    let Some(place) = place("timing_is_one_line_of_json") else { return };
    let outcome = run(&place, &["--timing", "--rm"], &["echo", "x"]);
    let line = outcome.stderr.trim_end().strip_prefix("bulkhead: timing ").unwrap();
    let timing: serde_json::Value = serde_json::from_str(line).unwrap();
    let ms = |key: &str| timing["timing"][key].as_f64().unwrap();
    assert!(ms("first_output_ms") <= ms("exit_ms") && ms("container_created_ms") > 0.0, "{line}");
    place.is_clean();
}

#[test]
fn volumes_show_the_host() {
    let Some(place) = place("volumes_show_the_host") else { return };
    fs::create_dir(place.path("data")).unwrap();
    fs::write(place.path("data/file"), "from the host\n").unwrap();
    let data = place.path("data");
    let volume = format!("{}:/mnt/data", data.display());
    let outcome =
        run(&place, &["-v", &volume], &["sh", "-c", "cat /mnt/data/file; echo back > /mnt/data/new"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (0, "from the host\n"), "{outcome:?}");
    assert_eq!(fs::read_to_string(data.join("new")).unwrap(), "back\n");
    let outcome = run(&place, &["-v", &format!("{volume}:ro")], &["sh", "-c", "echo x > /mnt/data/other"]);
    assert!(outcome.code != 0 && outcome.stderr.contains("Read-only"), "{outcome:?}");
    place.is_clean();
}
