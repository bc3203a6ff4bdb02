//! Pods for real: with the agent as a plain process, and in a VM. Needs root and an installation (`cargo xtask build`)
//! that `BULKHEAD_PREFIX` names; without, each test says that it was skipped.
#![allow(clippy::unwrap_used, reason = "a test's helpers may panic as its functions may")]

use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::fd::OwnedFd,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_sandbox::{
    Config, Container, ContainerSpec, Error, Hypervisor, ProcessState, Rootfs, Sandbox, SandboxSpec, Stdio,
    StdioTarget, cleanup, list,
};
use oci_spec::runtime::{Process, Spec};
use serde_json::{Value, json};

/// Where a test runs its pods.
struct Host {
    config: Config,
    directory: tempfile::TempDir,
}

impl Host {
    fn new(hypervisor: &str) -> Option<Host> {
        let Some(prefix) = std::env::var_os("BULKHEAD_PREFIX").map(PathBuf::from) else {
            println!("skipped: BULKHEAD_PREFIX is not set");
            return None;
        };
        let agent = prefix.join("libexec/bulkhead/bulkhead-agent");
        let mut host = Host::bare()?;
        host.config = Config {
            state_root: host.config.state_root.clone(),
            ..Config::load_from(&prefix, None).unwrap()
        };
        host.config.cache_dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache");
        if hypervisor == "local" {
            host.config.hypervisor = Hypervisor::Local { agent };
        }
        Some(host)
    }

    /// A host whose programs do not matter.
    fn bare() -> Option<Host> {
        if !nix::unistd::geteuid().is_root() {
            println!("skipped: pods need root");
            return None;
        }
        let directory = tempfile::Builder::new().prefix("bh-").tempdir().unwrap();
        let mut config = Config::load_from(Path::new("/nonexistent"), None).unwrap();
        config.state_root = directory.path().join("run");
        Some(Host { config, directory })
    }

    async fn pod(&self, id: &str) -> Arc<Sandbox> {
        let spec = SandboxSpec {
            id: id.into(),
            hostname: "bulkhead-test".into(),
            memory_mib: Some(256),
            labels: BTreeMap::from([("name".to_owned(), "x".to_owned())]),
            ..Default::default()
        };
        Sandbox::start(&self.config, spec).await.unwrap()
    }

    /// A bundle with a busybox root file system.
    fn bundle(&self, id: &str) -> PathBuf {
        let bundle = self.directory.path().join("bundles").join(id);
        let rootfs = bundle.join("rootfs");
        for name in ["bin", "dev", "proc", "sys", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in ["sh", "echo", "cat", "sleep", "hostname", "touch", "ls", "stty", "true"] {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        bundle
    }

    fn spec(&self, id: &str, command: &[&str], mounts: Value) -> ContainerSpec {
        let bundle = self.bundle(id);
        let mut all = vec![
            json!({"destination": "/proc", "type": "proc", "source": "proc"}),
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
            json!({"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666", "mode=0620"]}),
            json!({"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": ["size=65536k"]}),
        ];
        all.extend(mounts.as_array().unwrap().clone());
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "process": process(command),
            "root": {"path": "rootfs"},
            "mounts": all,
            "linux": {
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"}],
                "cgroupsPath": "system.slice:test:x"
            }
        }))
        .unwrap();
        let rootfs = Rootfs::Directory(bundle.join("rootfs"));
        ContainerSpec { id: id.into(), bundle, spec, rootfs, stdio: Stdio::default() }
    }

    /// Nothing of any pod is left.
    fn assert_clean(&self) {
        assert!(list(&self.config.state_root).unwrap().is_empty());
        let left: Vec<_> = fs::read_dir(&self.config.state_root).into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        let here = self.directory.path().to_str().unwrap().to_owned();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&here), "{mounts}");
    }
}

fn process(command: &[&str]) -> Value {
    json!({"user": {"uid": 0, "gid": 0}, "cwd": "/", "args": command, "env": ["PATH=/bin", "TERM=xterm"]})
}

fn exec_process(command: &[&str]) -> Process {
    serde_json::from_value(process(command)).unwrap()
}

fn pipe() -> (fs::File, StdioTarget) {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    (reader.into(), StdioTarget::Fd(writer))
}

async fn text(mut reader: fs::File) -> String {
    tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    })
    .await
    .unwrap()
}

/// Runs a command in a container; its output and exit code.
async fn exec(container: &Container, id: &str, command: &[&str]) -> (String, i32) {
    let (reader, stdout) = pipe();
    container.add_exec(id, exec_process(command), Stdio { stdout, ..Default::default() }).unwrap();
    container.start(id).await.unwrap();
    let text = text(reader).await;
    let exit = container.delete_when_ended(id).await;
    (text, exit)
}

trait Ended {
    async fn delete_when_ended(&self, id: &str) -> i32;
}

impl Ended for Container {
    async fn delete_when_ended(&self, id: &str) -> i32 {
        let exit = self.wait(id).await.unwrap();
        assert_eq!(self.delete(id).await.unwrap(), exit);
        exit.code
    }
}

async fn a_life(hypervisor: &str) {
    let Some(host) = Host::new(hypervisor) else { return };
    let pod = host.pod("pod1").await;
    println!("{hypervisor}: {:?} under {:?}", pod.timings(), pod.accel());
    println!("{:?}", pod.guest_timings().await.unwrap());
    let known = list(&host.config.state_root).unwrap();
    assert_eq!((known[0].id.as_str(), known[0].labels["name"].as_str()), ("pod1", "x"));
    let ((out, stdout), (err, stderr)) = (pipe(), pipe());
    let mut spec = host.spec("c1", &["sh", "-c", "echo out; echo err >&2; exit 7"], json!([]));
    spec.stdio = Stdio { stdout, stderr, ..Default::default() };
    let container = pod.create_container(spec).await.unwrap();
    assert_eq!(container.state("").unwrap(), ProcessState::Created);
    assert!(matches!(pod.create_container(host_spec_again(&host)).await, Err(Error::AlreadyExists { .. })));
    let begun = Instant::now();
    container.start("").await.unwrap();
    assert_eq!((text(out).await, text(err).await), ("out\n".into(), "err\n".into()));
    let exit = container.wait("").await.unwrap();
    println!("start to exit: {:?}", begun.elapsed());
    assert_eq!((exit.code, container.state("").unwrap()), (7, ProcessState::Stopped(exit)));
    assert!(matches!(container.kill("", 15, false).await, Err(Error::NotFound { .. })));
    assert_eq!(container.delete("").await.unwrap(), exit);
    assert!(pod.container("c1").is_err());
    let begun = Instant::now();
    let vmm = pod.vm_pid();
    let (one, two) = tokio::join!(pod.stop(), pod.stop());
    one.and(two).unwrap();
    println!("teardown: {:?}", begun.elapsed());
    assert!(!Path::new(&format!("/proc/{vmm}")).exists());
    host.assert_clean();
}

fn host_spec_again(host: &Host) -> ContainerSpec {
    let spec = serde_json::from_value(json!({"ociVersion": "1.0.2", "process": process(&["true"])})).unwrap();
    let bundle = host.directory.path().join("bundles/c1");
    ContainerSpec {
        id: "c1".into(),
        rootfs: Rootfs::Directory("rootfs".into()),
        bundle,
        spec,
        stdio: Stdio::default(),
    }
}

async fn execs_and_mounts(hypervisor: &str) {
    let Some(host) = Host::new(hypervisor) else { return };
    let data = host.directory.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("file"), "from the host").unwrap();
    let pod = host.pod("pod2").await;
    let spec = host.spec("c2", &["sleep", "300"], json!([
        {"destination": "/rw", "type": "bind", "source": data, "options": ["rbind", "rw"]},
        {"destination": "/ro", "type": "bind", "source": data, "options": ["rbind", "ro"]},
        {"destination": "/etc/one", "type": "bind", "source": data.join("file"), "options": ["bind", "ro"]},
    ]));
    let container = pod.create_container(spec).await.unwrap();
    container.start("").await.unwrap();
    assert_eq!(
        exec(&container, "e1", &["cat", "/rw/file", "/etc/one"]).await,
        ("from the hostfrom the host".into(), 0)
    );
    assert_eq!(exec(&container, "e1", &["hostname"]).await, ("bulkhead-test\n".into(), 0));
    assert_eq!(exec(&container, "e2", &["touch", "/rw/made"]).await.1, 0);
    assert!(data.join("made").exists());
    assert_eq!(exec(&container, "e3", &["touch", "/ro/not-made"]).await.1, 1);
    assert!(!data.join("not-made").exists());
    container.add_exec("e4", exec_process(&["no-such-command"]), Stdio::default()).unwrap();
    let error = container.start("e4").await.unwrap_err().to_string();
    assert!(error.contains("exec: \"no-such-command\": executable file not found in $PATH"), "{error}");
    assert_eq!(container.delete_when_ended("e4").await, 127);
    echo_through_cat(&container).await;
    background_child(&container).await;
    assert!(matches!(container.delete("e9").await, Err(Error::NotFound { .. })));
    assert_eq!(container.delete("").await.unwrap().code, 137);
    pod.stop().await.unwrap();
    host.assert_clean();
    assert_eq!(fs::read_to_string(data.join("file")).unwrap(), "from the host");
}

async fn echo_through_cat(container: &Container) {
    let (reader, stdout) = pipe();
    let (stdin, writer) = nix::unistd::pipe().unwrap();
    let stdio = Stdio { stdin: StdioTarget::Fd(stdin), stdout, ..Default::default() };
    container.add_exec("cat", exec_process(&["cat"]), stdio).unwrap();
    container.start("cat").await.unwrap();
    assert!(matches!(container.delete("cat").await, Err(Error::WrongState(_))));
    let data = "0123456789abcdef".repeat(50_000);
    let sent = data.clone();
    let write =
        move |fd: OwnedFd| std::io::Write::write_all(&mut fs::File::from(fd), sent.as_bytes()).unwrap();
    let writing = tokio::task::spawn_blocking(move || write(writer));
    assert!(text(reader).await == data, "the data came back changed");
    writing.await.unwrap();
    assert_eq!(container.delete_when_ended("cat").await, 0);
}

/// A process that leaves a child behind, which holds its output, ends all the same.
async fn background_child(container: &Container) {
    let begun = Instant::now();
    let (text, code) = exec(container, "bg", &["sh", "-c", "sleep 1000 & echo started"]).await;
    assert_eq!((text.as_str(), code), ("started\n", 0));
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

async fn a_terminal(hypervisor: &str) {
    let Some(host) = Host::new(hypervisor) else { return };
    let pod = host.pod("pod5").await;
    let (reader, stdout) = pipe();
    let mut spec = host.spec("c5", &["sh", "-c", "stty size; echo done >&2"], json!([]));
    spec.spec.process_mut().as_mut().unwrap().set_terminal(Some(true));
    spec.stdio = Stdio { stdout, terminal: true, ..Default::default() };
    let container = pod.create_container(spec).await.unwrap();
    container.resize("", 33, 99).await.unwrap();
    container.start("").await.unwrap();
    let text = text(reader).await;
    assert!(text.ends_with("done\r\n"), "{text:?}");
    assert_eq!(container.wait("").await.unwrap().code, 0);
    // Deleted with the pod.
    pod.stop().await.unwrap();
    host.assert_clean();
}

async fn a_command_that_is_missing(hypervisor: &str) {
    let Some(host) = Host::new(hypervisor) else { return };
    let pod = host.pod("pod3").await;
    let error =
        pod.create_container(host.spec("c3", &["/missing"], json!([]))).await.unwrap_err().to_string();
    assert!(error.contains("exec: \"/missing\": stat /missing: no such file or directory"), "{error}");
    assert!(pod.containers().is_empty());
    pod.stop().await.unwrap();
    host.assert_clean();
}

async fn a_vm_that_is_killed(hypervisor: &str) {
    let Some(host) = Host::new(hypervisor) else { return };
    let pod = host.pod("pod4").await;
    let container = pod.create_container(host.spec("c4", &["sleep", "300"], json!([]))).await.unwrap();
    container.start("").await.unwrap();
    let begun = Instant::now();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pod.vm_pid()).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(container.wait("").await.unwrap().code, 137);
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    pod.wait().await;
    assert!(matches!(container.stats().await, Err(Error::Vm(_))));
    assert!(matches!(container.kill("", 9, true).await, Err(Error::NotFound { .. })));
    assert_eq!(container.delete("").await.unwrap().code, 137);
    pod.stop().await.unwrap();
    host.assert_clean();
}

/// A plain process has no cgroup to read or freeze.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn figures_and_pauses() {
    let Some(host) = Host::new("qemu") else { return };
    let pod = host.pod("pod7").await;
    let container = pod.create_container(host.spec("c7", &["sleep", "300"], json!([]))).await.unwrap();
    container.start("").await.unwrap();
    let stats = container.stats().await.unwrap();
    assert!(stats.cgroup_stats.memory_stats.usage.usage > 0, "{stats:?}");
    container.pause().await.unwrap();
    assert_eq!(container.state("").unwrap(), ProcessState::Paused);
    container.add_exec("e", exec_process(&["true"]), Stdio::default()).unwrap();
    assert!(matches!(container.start("e").await, Err(Error::WrongState(_))));
    container.resume().await.unwrap();
    assert_eq!(container.state("").unwrap(), ProcessState::Running);
    container.start("e").await.unwrap();
    assert_eq!(container.delete_when_ended("e").await, 0);
    let limits = json!({"pids": {"limit": 50}, "memory": {"limit": 67_108_864}});
    container.update(&serde_json::from_value(limits).unwrap()).await.unwrap();
    assert_eq!(container.stats().await.unwrap().cgroup_stats.pids_stats.limit, 50);
    container.kill("", 15, false).await.unwrap();
    let code = container.wait("").await.unwrap().code;
    assert!(code == 143 || code == 137, "{code}");
    pod.stop().await.unwrap();
    host.assert_clean();
}

/// The agent's connection goes, the VM lives: of no use to anybody, it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_breaks() {
    let Some(host) = Host::new("qemu") else { return };
    let pod = host.pod("pod8").await;
    let container = pod.create_container(host.spec("c8", &["sleep", "300"], json!([]))).await.unwrap();
    container.start("").await.unwrap();
    let state = &list(&host.config.state_root).unwrap()[0];
    let helpers: Vec<u32> =
        state.processes.iter().map(|process| process.pid).filter(|pid| *pid != pod.vm_pid()).collect();
    assert!(!helpers.is_empty());
    let begun = Instant::now();
    for pid in helpers {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    assert_eq!(container.wait("").await.unwrap().code, 137);
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(matches!(pod.next_oom().await, Err(Error::Vm(_))));
    pod.stop().await.unwrap();
    host.assert_clean();
}

async fn a_pod_that_is_dropped(hypervisor: &str) {
    let Some(host) = Host::new(hypervisor) else { return };
    let pod = host.pod("pod6").await;
    let container = pod.create_container(host.spec("c6", &["sleep", "300"], json!([]))).await.unwrap();
    container.start("").await.unwrap();
    let vmm = pod.vm_pid();
    drop(pod);
    drop(container);
    let alive = fs::read_to_string(format!("/proc/{vmm}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
    assert!(!alive, "the VMM outlived its pod");
    host.assert_clean();
}

macro_rules! pods {
    ($($name:ident),*) => {
        mod local { $( #[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name("local").await } )* }
        mod qemu { $( #[tokio::test(flavor = "multi_thread", worker_threads = 2)] async fn $name() { super::$name("qemu").await } )* }
    };
}

pods!(
    a_life,
    execs_and_mounts,
    a_terminal,
    a_command_that_is_missing,
    a_vm_that_is_killed,
    a_pod_that_is_dropped
);

#[tokio::test]
async fn an_agent_that_dies_at_once_is_an_error_at_once() {
    let Some(mut host) = Host::bare() else { return };
    let agent = host.directory.path().join("agent");
    fs::write(&agent, "#!/bin/sh\necho these are my last words >&2\nexit 3\n").unwrap();
    fs::set_permissions(&agent, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    host.config.hypervisor = Hypervisor::Local { agent };
    let begun = Instant::now();
    let error = Sandbox::start(&host.config, SandboxSpec { id: "dead".into(), ..Default::default() })
        .await
        .unwrap_err();
    assert!(error.to_string().contains("these are my last words"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
    host.assert_clean();
}

#[tokio::test]
async fn what_is_missing_is_named_and_nothing_is_left() {
    let Some(mut host) = Host::bare() else { return };
    host.config.kernel = "/nonexistent/vmlinuz".into();
    let error = Sandbox::start(&host.config, SandboxSpec { id: "none".into(), ..Default::default() })
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Vm(_)), "{error}");
    host.assert_clean();
    cleanup(&host.config.state_root, "none").unwrap();
}
