//! A scripted containerd: runs the shim the way containerd does, receives its events, and speaks its task service.

#![allow(dead_code, missing_docs, unreachable_pub, reason = "each test binary uses its part")]

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use containerd_shim_protos::{
    api::{Empty, ForwardRequest},
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
        TaskStart,
    },
    shim_async::{Client, Events, TaskClient, create_events},
};
use nix::sys::stat::Mode;
use protobuf::Message;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use tokio::{sync::Notify, time};
use ttrpc::{
    r#async::{Server, TtrpcContext},
    context::Context,
};

/// A hang is a failure, after this long.
pub const BOUND: Duration = Duration::from_secs(20);
pub const NAMESPACE: &str = "tests";

/// The tests need root, for mounts and `/run`; says so and returns true where there is none.
pub fn skip() -> bool {
    let skip = !nix::unistd::geteuid().is_root();
    if skip {
        eprintln!("SKIPPED: needs root");
    }
    skip
}

/// The static busybox that containers are made of.
pub fn busybox() -> Option<PathBuf> {
    let found =
        ["/bin/busybox", "/usr/bin/busybox"].map(PathBuf::from).into_iter().find(|path| path.exists());
    if found.is_none() {
        eprintln!("SKIPPED: needs busybox-static");
    }
    found
}

/// The guest agent, built beside the shim or named by `$BULKHEAD_TEST_AGENT`.
pub fn agent() -> Option<PathBuf> {
    let beside =
        Path::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2")).with_file_name("bulkhead-agent");
    let found = std::env::var_os("BULKHEAD_TEST_AGENT").map_or(beside, PathBuf::from);
    if !found.exists() {
        eprintln!(
            "SKIPPED: no agent at {}; build bulkhead-agent, or name it in BULKHEAD_TEST_AGENT",
            found.display()
        );
        return None;
    }
    Some(found)
}

#[derive(Default)]
struct Recorder {
    seen: Mutex<Vec<String>>,
    news: Notify,
}

#[async_trait::async_trait]
impl Events for Recorder {
    async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = &request.envelope;
        assert_eq!(envelope.namespace, NAMESPACE);
        let line = describe(&envelope.topic, &envelope.event.type_url, &envelope.event.value);
        self.seen.lock().unwrap().push(line);
        self.news.notify_waiters();
        Ok(Empty::new())
    }
}

fn describe(topic: &str, type_url: &str, value: &[u8]) -> String {
    macro_rules! parse {
        ($($name:ident($event:ident) => $text:expr,)*) => {
            match type_url.strip_prefix("containerd.events.") {
                $(Some(stringify!($name)) => {
                    let $event = $name::parse_from_bytes(value).unwrap();
                    $text
                })*
                _ => panic!("unknown event {type_url}"),
            }
        };
    }
    let what = parse! {
        TaskCreate(e) => e.container_id,
        TaskStart(e) => e.container_id,
        TaskExit(e) => format!("{} {} {}", e.container_id, e.id, e.exit_status),
        TaskDelete(e) => format!("{} {} {}", e.container_id, e.id, e.exit_status),
        TaskExecAdded(e) => format!("{} {}", e.container_id, e.exec_id),
        TaskExecStarted(e) => format!("{} {}", e.container_id, e.exec_id),
        TaskPaused(e) => e.container_id,
        TaskResumed(e) => e.container_id,
        TaskOOM(e) => e.container_id,
    };
    format!("{} {what}", topic.strip_prefix("/tasks/").unwrap())
}

/// One containerd, with directories and sockets of its own.
pub struct Containerd {
    directory: tempfile::TempDir,
    recorder: Arc<Recorder>,
    _events: Server,
    servers: Mutex<Vec<Pid>>,
}

impl Containerd {
    /// With a configuration for the shims: `[hypervisor...]`, `[runtime]` without the state directory.
    pub async fn new(configuration: &str) -> Containerd {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Arc::new(Recorder::default());
        let address = format!("unix://{}", directory.path().join("ttrpc").display());
        let mut events =
            Server::new().bind(&address).unwrap().register_service(create_events(recorder.clone()));
        events.start().await.unwrap();
        fs::write(directory.path().join("configuration.toml"), configuration).unwrap();
        Containerd { directory, recorder, _events: events, servers: Mutex::default() }
    }

    /// With the agent as a plain process instead of a VM.
    pub async fn local(agent: &Path) -> Containerd {
        let agent = agent.display();
        let text =
            format!("[hypervisor.local]\nagent = \"{agent}\"\n[runtime]\nhypervisor_name = \"local\"\n");
        Containerd::new(&text).await
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn state_root(&self) -> PathBuf {
        self.path().join("state")
    }

    pub fn bundle(&self, id: &str) -> PathBuf {
        self.path().join("bundles").join(id)
    }

    /// Makes a bundle: the configuration, a busybox as root file system, the `log` fifo.
    pub fn make_bundle(&self, id: &str, spec: &serde_json::Value) -> PathBuf {
        let bundle = self.bundle(id);
        let bin = bundle.join("rootfs/bin");
        fs::create_dir_all(&bin).unwrap();
        for name in ["proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir(bundle.join("rootfs").join(name)).unwrap();
        }
        if let Some(busybox) = busybox() {
            fs::copy(busybox, bin.join("busybox")).unwrap();
            for applet in ["sh", "sleep", "cat", "echo", "true", "stty", "yes", "head"] {
                std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
            }
        }
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        nix::unistd::mkfifo(&bundle.join("log"), Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        bundle
    }

    fn command(&self, id: &str, action: &str, debug: bool) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2"));
        command
            .args(["-namespace", NAMESPACE, "-address"])
            .arg(self.path().join("containerd.sock"))
            .args(["-publish-binary", "/usr/bin/containerd", "-id", id])
            .args(debug.then_some("-debug"))
            .arg("-bundle")
            .arg(self.bundle(id))
            .arg(action)
            .current_dir(self.bundle(id))
            .env("TTRPC_ADDRESS", self.path().join("ttrpc"))
            .env("MAX_SHIM_VERSION", "2")
            .env("BULKHEAD_CONFIG", self.path().join("configuration.toml"))
            .env("BULKHEAD_STATE", self.state_root());
        command
    }

    /// Runs `start` with `input`; both of its output streams as one, as containerd takes them.
    pub fn start_with(&self, id: &str, input: &[u8]) -> Result<Vec<u8>, String> {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut child = self
            .command(id, "start", true)
            .stdin(Stdio::piped())
            .stdout(writer.try_clone().unwrap())
            .stderr(writer)
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let status = child.wait().unwrap();
        // The command held the other write ends; the server must not hold one.
        let mut output = Vec::new();
        reader.read_to_end(&mut output).unwrap();
        if let Ok(pid) = fs::read_to_string(self.bundle(id).join("shim.pid")) {
            self.servers.lock().unwrap().extend(Pid::from_raw(pid.trim().parse().unwrap()));
        }
        if status.success() { Ok(output) } else { Err(String::from_utf8_lossy(&output).into_owned()) }
    }

    /// Runs `start`; the address, and the server at it.
    pub async fn start(&self, id: &str) -> Shim {
        let address = String::from_utf8(self.start_with(id, b"").unwrap()).unwrap();
        Shim::connect(&address).await
    }

    pub fn delete(&self, id: &str) -> Output {
        self.command(id, "delete", false).output().unwrap()
    }

    pub fn server_pid(&self, id: &str) -> Pid {
        let pid = fs::read_to_string(self.bundle(id).join("shim.pid")).unwrap();
        Pid::from_raw(pid.trim().parse().unwrap()).unwrap()
    }

    /// The events so far.
    pub fn events(&self) -> Vec<String> {
        self.recorder.seen.lock().unwrap().clone()
    }

    /// The events, once the last of them begins with `last`.
    pub async fn events_until(&self, last: &str) -> Vec<String> {
        let until = async {
            loop {
                let news = self.recorder.news.notified();
                let seen = self.events();
                if seen.last().is_some_and(|line| line.starts_with(last)) {
                    return seen;
                }
                news.await;
            }
        };
        match time::timeout(BOUND, until).await {
            Ok(seen) => seen,
            Err(_) => panic!("no event {last:?} after {BOUND:?}, only {:?}", self.events()),
        }
    }

    /// What the pods left in the state directory.
    pub fn leftovers(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.state_root())
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect());
        entries.unwrap_or_default()
    }

    /// A fifo for a stream, held open as containerd does.
    pub fn fifo(&self, name: &str) -> (String, File) {
        let path = self.path().join(name);
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        (path.display().to_string(), file)
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for pid in self.servers.lock().unwrap().drain(..) {
            let _ = kill_process(pid, Signal::KILL);
        }
        // Only a failed test leaves any.
        for bundle in fs::read_dir(self.path().join("bundles")).into_iter().flatten().flatten() {
            if let Ok(address) = fs::read_to_string(bundle.path().join("address")) {
                let _ = fs::remove_file(address.trim_start_matches("unix://"));
            }
        }
    }
}

/// A connection to a server.
pub struct Shim {
    pub path: PathBuf,
    pub client: Client,
    pub tasks: TaskClient,
}

impl Shim {
    pub async fn connect(address: &str) -> Shim {
        let path = PathBuf::from(
            address.strip_prefix("unix://").unwrap_or_else(|| panic!("{address:?} is no address")),
        );
        let client = Client::connect(address).await.unwrap();
        Shim { path, tasks: TaskClient::new(client.clone()), client }
    }
}

pub fn context() -> Context {
    ttrpc::context::with_duration(BOUND)
}

/// The code of a failed call.
pub fn code<T: std::fmt::Debug>(outcome: ttrpc::Result<T>) -> ttrpc::Code {
    match outcome.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other} has no code"),
    }
}

pub fn text<T: std::fmt::Debug>(outcome: ttrpc::Result<T>) -> String {
    match outcome.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
        other => panic!("{other} has no text"),
    }
}

/// Waits for the end of a process that is not a child of ours.
pub async fn ended(pid: Pid) {
    let ended = async {
        // Signal 0 reaches zombies too: a test's process may be reaped late.
        while test_kill_process(pid).is_ok() && !is_zombie(pid) {
            time::sleep(Duration::from_millis(10)).await;
        }
    };
    time::timeout(BOUND, ended).await.unwrap_or_else(|_| panic!("process {pid:?} did not end"));
}

fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('Z'))
}

/// A configuration for a command, without limits or namespaces that a plain process could not have.
pub fn spec(args: &[&str], annotations: serde_json::Value) -> serde_json::Value {
    serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "hostname": "test",
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "annotations": annotations,
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]}
    })
}
