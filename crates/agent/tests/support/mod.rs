//! A real agent as a plain process, in a mount namespace of its own, and a busybox to run in it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    os::unix::{fs::symlink, process::ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    time::{Duration, Instant},
};

use bulkhead_protocol::{
    agent::*,
    agent_ttrpc::AgentServiceClient,
    health_ttrpc::HealthClient,
    oci,
    protobuf::MessageField,
    status::{Kind, message},
};
use ttrpc::context::{Context, with_duration};

/// Nothing in these tests takes this long; a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// Capabilities of a container by default, in the usual engines' choice.
const CAPABILITIES: [&str; 6] =
    ["CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"];

pub(crate) struct Agent {
    process: Child,
    directory: tempfile::TempDir,
    pub(crate) client: AgentServiceClient,
    pub(crate) health: HealthClient,
}

/// Why these tests cannot run here, if they cannot.
pub(crate) fn cannot_run() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("containers need root");
    }
    (!Path::new("/bin/busybox").exists()).then_some("there is no /bin/busybox (package busybox-static)")
}

/// The agent under test: the one of this build, unless a benchmark names another.
pub(crate) fn program() -> String {
    std::env::var("BULKHEAD_BENCH_AGENT").unwrap_or_else(|_| env!("CARGO_BIN_EXE_bulkhead-agent").into())
}

/// The deadline of every call.
pub(crate) fn context() -> Context {
    with_duration(PATIENCE)
}

impl Agent {
    /// Starts an agent. It dies with this test.
    pub(crate) async fn start() -> Agent {
        Agent::start_with("").await
    }

    /// Starts an agent with a configuration file.
    pub(crate) async fn start_with(settings: &str) -> Agent {
        let directory = tempfile::tempdir().unwrap();
        make_rootfs(&directory.path().join("rootfs"));
        let address = format!("unix://{}", directory.path().join("agent.sock").display());
        let file = directory.path().join("agent.toml");
        std::fs::write(&file, settings).unwrap();
        let script = "mount -t tmpfs tmpfs /run && mkdir /run/kata-containers && exec \"$0\" --server \"$1\" -c \"$2\"";
        let process = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "-m", "--propagation", "private", "sh", "-c", script])
            .args([&program(), &address])
            .arg(file)
            .spawn()
            .unwrap();
        let connection = connect(&address).await;
        Agent {
            process,
            directory,
            client: AgentServiceClient::new(connection.clone()),
            health: HealthClient::new(connection),
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.directory.path().join("rootfs")
    }

    /// A complete container configuration that runs a command.
    pub(crate) fn spec(&self, command: &[&str]) -> oci::Spec {
        let mount = |destination: &str, kind: &str, source: &str, options: &[&str]| oci::Mount {
            destination: destination.into(),
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Default::default()
        };
        let namespace = |kind: &str| oci::LinuxNamespace { Type: kind.into(), ..Default::default() };
        oci::Spec {
            Version: "1.0.2".into(),
            Process: MessageField::some(process(command)),
            Root: MessageField::some(oci::Root {
                Path: self.rootfs().to_str().unwrap().into(),
                ..Default::default()
            }),
            Mounts: vec![
                mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount(
                    "/dev/pts",
                    "devpts",
                    "devpts",
                    &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
                ),
            ],
            Linux: MessageField::some(oci::Linux {
                Namespaces: ["ipc", "uts", "mount", "network"].map(namespace).to_vec(),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub(crate) async fn create(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: MessageField::some(spec),
            ..Default::default()
        };
        self.client.create_container(context(), &request).await.map(drop)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.start_container(context(), &request).await.map(drop)
    }

    /// Creates and starts a container.
    pub(crate) async fn run(&self, id: &str, command: &[&str]) {
        self.create(id, self.spec(command)).await.unwrap();
        self.start_container(id).await.unwrap();
    }

    pub(crate) async fn exec(&self, id: &str, exec_id: &str, process: oci::Process) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: MessageField::some(process),
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await.map(drop)
    }

    pub(crate) async fn signal(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await.map(drop)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<i32> {
        let request =
            WaitProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.client.wait_process(context(), &request).await.map(|response| response.status)
    }

    pub(crate) async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.remove_container(context(), &request).await.map(drop)
    }

    pub(crate) async fn write(&self, id: &str, exec_id: &str, data: &[u8]) -> ttrpc::Result<u32> {
        let request = WriteStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            data: data.to_vec(),
            ..Default::default()
        };
        self.client.write_stdin(context(), &request).await.map(|response| response.len)
    }

    pub(crate) async fn close(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let request =
            CloseStdinRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.client.close_stdin(context(), &request).await.map(drop)
    }

    pub(crate) async fn read(&self, id: &str, exec_id: &str) -> ttrpc::Result<Vec<u8>> {
        let request = read_request(id, exec_id);
        self.client.read_stdout(context(), &request).await.map(|response| response.data)
    }

    /// Standard output to its end.
    pub(crate) async fn stdout(&self, id: &str, exec_id: &str) -> String {
        let mut all = Vec::new();
        loop {
            let data = self.read(id, exec_id).await.unwrap();
            if data.is_empty() {
                return String::from_utf8(all).unwrap();
            }
            all.extend(data);
        }
    }

    /// Standard error to its end.
    pub(crate) async fn stderr(&self, id: &str, exec_id: &str) -> String {
        let mut all = Vec::new();
        loop {
            let data = self.client.read_stderr(context(), &read_request(id, exec_id)).await.unwrap().data;
            if data.is_empty() {
                return String::from_utf8(all).unwrap();
            }
            all.extend(data);
        }
    }

    /// Runs a shell line in a container to its end: its output and exit code.
    pub(crate) async fn shell(&self, id: &str, exec_id: &str, line: &str) -> (String, i32) {
        self.exec(id, exec_id, process(&["sh", "-c", line])).await.unwrap();
        (self.stdout(id, exec_id).await, self.wait(id, exec_id).await.unwrap())
    }

    /// Open descriptors of the agent.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid())).unwrap().count()
    }

    /// The same, once the last of what was removed has been closed, which happens behind the answer.
    pub(crate) async fn settled_descriptors(&self) -> usize {
        loop {
            let before = self.descriptors();
            tokio::time::sleep(Duration::from_millis(100)).await;
            if self.descriptors() == before {
                return before;
            }
        }
    }

    /// Ends the sandbox; how the agent then ended.
    pub(crate) async fn destroy(mut self) -> ExitStatus {
        self.client.destroy_sandbox(context(), &DestroySandboxRequest::new()).await.unwrap();
        tokio::task::spawn_blocking(move || self.process.wait().unwrap()).await.unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // It takes its containers along.
        let pid = rustix::process::Pid::from_child(&self.process);
        if matches!(self.process.try_wait(), Ok(None)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            let status = self.process.wait();
            assert!(
                std::thread::panicking() || status.as_ref().is_ok_and(|status| status.success()),
                "the agent did not end well: {:?}",
                status.map(|status| (status.code(), status.signal()))
            );
        }
    }
}

fn read_request(id: &str, exec_id: &str) -> ReadStreamRequest {
    ReadStreamRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        len: 32 << 10,
        ..Default::default()
    }
}

async fn connect(address: &str) -> ttrpc::r#async::Client {
    let start = Instant::now();
    loop {
        match ttrpc::r#async::Client::connect(address).await {
            Ok(client) => return client,
            Err(error) if start.elapsed() > PATIENCE => {
                panic!("the agent does not listen on {address}: {error}")
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// A process that runs a command, without a terminal.
pub(crate) fn process(command: &[&str]) -> oci::Process {
    let capabilities = || CAPABILITIES.map(str::to_owned).to_vec();
    oci::Process {
        Args: command.iter().map(|argument| (*argument).to_owned()).collect(),
        Env: vec!["PATH=/bin".into(), "TERM=xterm".into()],
        Cwd: "/".into(),
        Capabilities: MessageField::some(oci::LinuxCapabilities {
            Bounding: capabilities(),
            Effective: capabilities(),
            Permitted: capabilities(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn make_rootfs(rootfs: &Path) {
    for directory in ["bin", "proc", "dev", "tmp", "etc"] {
        std::fs::create_dir_all(rootfs.join(directory)).unwrap();
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    let applets = Command::new("/bin/busybox").arg("--list").output().unwrap().stdout;
    for applet in String::from_utf8(applets).unwrap().lines() {
        if applet != "busybox" {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
    }
    std::fs::write(rootfs.join("bin/data"), "not a program\n").unwrap();
}

/// Asserts what kind of error it was; its text.
pub(crate) fn failed<T: std::fmt::Debug>(result: ttrpc::Result<T>, kind: Kind) -> String {
    let error = result.unwrap_err();
    assert_eq!(Kind::of_error(&error), kind, "{error}");
    message(&error)
}
