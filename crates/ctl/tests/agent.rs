//! `bulkhead agent` against a real agent that runs as a plain process.
//!
//! They need root, busybox, and the agent built beside the program (`cargo build --workspace`) or named by
//! `BULKHEAD_TEST_AGENT`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod fixture;

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use fixture::{Outcome, Place, is_root};
use serde_json::{Value, json};

/// A hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent of its own mount namespace, which dies with the test.
struct Agent {
    process: Child,
    address: String,
}

impl Agent {
    fn start(place: &Place, name: &str) -> Agent {
        let socket = place.path(name);
        let address = format!("unix://{}", socket.display());
        let script = "mount -t tmpfs tmpfs /run && mkdir /run/kata-containers && exec \"$0\" --server \"$1\"";
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "-m", "--propagation", "private", "sh", "-c", script])
            .arg(agent())
            .arg(&address)
            .spawn()
            .unwrap();
        let agent = Agent { process, address };
        let began = Instant::now();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            assert!(began.elapsed() < PATIENCE, "the agent does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        agent
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        terminate(&self.process);
        let _ = self.process.wait();
    }
}

fn terminate(process: &Child) {
    let pid = rustix::process::Pid::from_child(process);
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
}

fn agent() -> PathBuf {
    std::env::var_os("BULKHEAD_TEST_AGENT").map_or_else(
        || Path::new(env!("CARGO_BIN_EXE_bulkhead")).with_file_name("bulkhead-agent"),
        PathBuf::from,
    )
}

fn place(test: &str) -> Option<Place> {
    if !agent().exists() {
        eprintln!("SKIPPED {test}: needs the agent beside the program; run `cargo build --workspace`");
        return None;
    }
    is_root(test).then(|| Place::new("", ""))
}

fn call(place: &Place, address: &str, args: &[&str]) -> Outcome {
    place.run(&[&["agent", "call", "--addr", address], args].concat())
}

#[track_caller]
fn reply(outcome: &Outcome) -> Value {
    assert_eq!((outcome.code, outcome.stderr.as_str()), (0, ""), "{outcome:?}");
    serde_json::from_str(&outcome.stdout).unwrap()
}

#[test]
fn any_method_can_be_called() {
    let Some(place) = place("any_method_can_be_called") else { return };
    let agent = Agent::start(&place, "agent.sock");
    let call = |args: &[&str]| call(&place, &agent.address, args);
    assert_eq!(reply(&call(&["Health.Check"])), json!({"status": "SERVING"}));
    assert_eq!(reply(&call(&["Check", "null"]))["status"], "SERVING");
    fs::write(place.path("request.json"), r#"{"memBlockSize": true}"#).unwrap();
    let details = reply(&call(&["--metadata", "a=b", "grpc.AgentService/GetGuestDetails", "@request.json"]));
    assert_eq!(details["agent_details"]["supports_seccomp"], true);
    assert!(details["mem_block_size_bytes"].is_string());

    let mut child = place
        .command(&["agent", "call", "--addr", &agent.address, "GetGuestDetails", "@-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"{\"mem_block_size\": false}").unwrap();
    let outcome = Outcome::of(child.wait_with_output().unwrap());
    assert_eq!(reply(&outcome)["mem_block_size_bytes"], "0");

    call(&["StatsContainer", r#"{"container_id": "absent"}"#])
        .fails(1, &["StatsContainer: INVALID_ARGUMENT (3): ", "absent"]);
    call(&["--timeout", "0.2", "GetOOMEvent"]).fails(1, &["GetOOMEvent: "]);
    call(&["GetOOMEvnt"]).fails(1, &["no method GetOOMEvnt", "nearest is GetOOMEvent"]);
    call(&["WaitProcess", r#"{"container": "x"}"#]).fails(1, &["no field container", "container_id"]);
    call(&["WaitProcess", "{"]).fails(1, &["not JSON"]);
    call(&["WaitProcess", "@absent"]).fails(1, &["absent", "No such file"]);
}

#[test]
fn an_agent_that_is_not_there_is_said_at_once() {
    let place = Place::new("", "");
    let began = Instant::now();
    call(&place, "unix:///no/such.sock", &["Check"]).fails(1, &["reach the agent at unix:///no/such.sock"]);
    call(&place, "hvsock:///no/such.sock:1024", &["Check"]).fails(1, &["hvsock:///no/such.sock:1024"]);
    place.run(&["agent", "call", "Check"]).fails(1, &["no sandbox runs here", "--addr"]);
    place.run(&["agent", "call", "--pod", "x", "Check"]).fails(1, &["no sandbox named x"]);
    assert!(began.elapsed() < PATIENCE);
    let list = place.run(&["agent", "call", "--list"]);
    assert_eq!((list.code, list.stdout.lines().count()), (0, 44));
    assert!(
        list.stdout
            .contains("grpc.AgentService/WaitProcess grpc.WaitProcessRequest -> grpc.WaitProcessResponse")
    );
    let outcome = place.run(&["agent", "call", "--addr", "tcp://x", "Check"]);
    assert!(outcome.code == 125 && outcome.stderr.contains("vsock://CID:PORT"), "{outcome:?}");
    place.is_clean();
}

/// The recorder, up to its word that it listens.
fn record(place: &Place, agent: &Agent, file: &str) -> (Child, String) {
    let address = format!("unix://{}", place.path("proxy.sock").display());
    let mut child = place
        .command(&["agent", "record", "--listen", &address, "--addr", &agent.address, file])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut line).unwrap();
    assert!(line.starts_with("recording "), "{line}");
    (child, address)
}

fn create_request(rootfs: &Path) -> String {
    json!({"container_id": "c1", "OCI": {
        "Version": "1.0.2",
        "Process": {"Args": ["/bin/busybox", "cat"], "Cwd": "/", "Env": ["PATH=/bin"], "User": {}},
        "Root": {"Path": rootfs},
        "Mounts": [{"destination": "/proc", "source": "proc", "type": "proc"}],
        "Linux": {"Namespaces": [{"Type": "mount"}, {"Type": "ipc"}, {"Type": "uts"}, {"Type": "network"}]},
    }})
    .to_string()
}

/// A container's life, with a call that waits while others are made.
fn live(place: &Place, address: &str) {
    let id = r#"{"container_id": "c1"}"#;
    let exec = r#"{"container_id": "c1", "exec_id": "c1"}"#;
    reply(&call(place, address, &["CreateContainer", &create_request(&place.path("rootfs"))]));
    reply(&call(place, address, &["StartContainer", id]));
    let wait = place
        .command(&["agent", "call", "--addr", address, "WaitProcess", exec])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let write = r#"{"container_id": "c1", "exec_id": "c1", "data": "aGVsbG8K"}"#;
    assert_eq!(reply(&call(place, address, &["WriteStdin", write]))["len"], 6);
    let read = r#"{"container_id": "c1", "exec_id": "c1", "len": 4096}"#;
    assert_eq!(reply(&call(place, address, &["ReadStdout", read]))["data"], "aGVsbG8K");
    reply(&call(place, address, &["CloseStdin", exec]));
    assert_eq!(reply(&Outcome::of(wait.wait_with_output().unwrap())), json!({"status": 0}));
    reply(&call(place, address, &["RemoveContainer", id]));
    call(place, address, &["StatsContainer", id]).fails(1, &["INVALID_ARGUMENT"]);
}

#[test]
fn what_was_recorded_is_replayed_and_compared() {
    let test = "what_was_recorded_is_replayed_and_compared";
    let Some(place) = place(test) else { return };
    if !Path::new("/bin/busybox").exists() {
        eprintln!("SKIPPED {test}: needs busybox-static");
        return;
    }
    for directory in ["bin", "proc", "dev", "tmp"] {
        fs::create_dir_all(place.path("rootfs").join(directory)).unwrap();
    }
    fs::copy("/bin/busybox", place.path("rootfs/bin/busybox")).unwrap();

    let agent = Agent::start(&place, "agent.sock");
    let (mut recorder, address) = record(&place, &agent, "trace");
    live(&place, &address);
    // A call that is still open when the recording ends.
    let mut open = place
        .command(&["agent", "call", "--addr", &address, "GetOOMEvent"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    // A later call on the proxy's single thread proves nothing about the open one, so its connection is waited for.
    while connections(&recorder) < 2 {
        assert!(began.elapsed() < PATIENCE, "the open call has not come");
        std::thread::sleep(Duration::from_millis(5));
    }
    terminate(&recorder);
    assert!(recorder.wait().unwrap().success());
    assert!(!open.wait().unwrap().success());
    assert!(!place.path("proxy.sock").exists());
    drop(agent);

    let trace = fs::read_to_string(place.path("trace")).unwrap();
    let entries: Vec<Value> = trace.lines().skip(1).map(|line| serde_json::from_str(line).unwrap()).collect();
    let entry = |method: &str| {
        let path = format!("grpc.AgentService/{method}");
        entries.iter().find(|entry| entry["method"] == path.as_str()).unwrap()
    };
    assert_eq!(entry("WriteStdin")["request"]["data"], "aGVsbG8K");
    assert_eq!(entry("StatsContainer")["status"]["code"], 3);
    let (wait, write) = (entry("WaitProcess"), entry("WriteStdin"));
    assert!(wait["duration_us"].as_u64() > Some(0) && write["timeout_ns"] == 60_000_000_000_u64);

    let agent = Agent::start(&place, "fresh.sock");
    for speed in ["as-fast", "2"] {
        let replayed = place.run(&["agent", "replay", "--addr", &agent.address, "trace", "--speed", speed]);
        assert_eq!(replayed.code, 0, "{replayed:?}");
        assert!(replayed.stdout.lines().any(|line| line.starts_with("WaitProcess  ")), "{}", replayed.stdout);
    }
    // An answer that this agent does not give.
    let altered = trace.replacen(r#""reply":{"len":6}"#, r#""reply":{"len":7}"#, 1);
    assert_ne!(altered, trace);
    fs::write(place.path("altered"), altered).unwrap();
    let replay = |more: &[&str]| {
        place.run(
            &[&["agent", "replay", "--addr", &agent.address, "altered", "--speed", "as-fast"], more].concat(),
        )
    };
    let replayed = replay(&[]);
    assert_eq!(replayed.code, 1, "{replayed:?}");
    assert!(replayed.stdout.contains(r#"recorded {"len":7}, replayed {"len":6}"#), "{}", replayed.stdout);
    assert_eq!(replay(&["--ignore", "len"]).code, 0);
}

/// Connected sockets of a process: what it has open besides its own three, the runtime's and the listener.
fn connections(process: &Child) -> usize {
    let descriptors = fs::read_dir(format!("/proc/{}/fd", process.id())).unwrap().flatten();
    let sockets = descriptors.filter(|entry| {
        fs::read_link(entry.path()).is_ok_and(|target| target.to_string_lossy().starts_with("socket:"))
    });
    // The listener, and the pair that wakes the runtime for signals.
    sockets.count().saturating_sub(3)
}

#[test]
fn a_killed_recorder_leaves_complete_lines() {
    let Some(place) = place("a_killed_recorder_leaves_complete_lines") else { return };
    let agent = Agent::start(&place, "agent.sock");
    let (mut recorder, address) = record(&place, &agent, "trace");
    for _ in 0..3 {
        reply(&call(&place, &address, &["Check"]));
    }
    recorder.kill().unwrap();
    recorder.wait().unwrap();
    let trace = fs::read_to_string(place.path("trace")).unwrap();
    assert!(trace.ends_with('\n'));
    let lines: Vec<Value> = trace.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 1 + 3);
}
