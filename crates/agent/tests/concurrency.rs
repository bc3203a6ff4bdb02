//! What is slow or hangs in one container delays no other, and a client that gives up leaves a consistent state.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "each file of tests uses a part")]
mod support;

use std::{
    fs::File,
    future::Future,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_protocol::{
    agent::*, agent_ttrpc::AgentServiceClient, oci, protobuf::MessageField, status::Kind,
};
use support::{Agent, cannot_run, context, failed, process};
use ttrpc::context::with_duration;

/// What is not delayed takes a fraction of a second; what waits for the slow one would take this long and more.
const QUICK: Duration = Duration::from_secs(20);

macro_rules! agent_or_skip {
    () => {{
        if let Some(reason) = cannot_run() {
            eprintln!("skipped: {reason}");
            return;
        }
        Agent::start().await
    }};
}

/// A hook that says that it runs, and then waits until it is let go.
struct Gate {
    directory: tempfile::TempDir,
}

impl Gate {
    fn new() -> Gate {
        Gate { directory: tempfile::tempdir().unwrap() }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn hook(&self) -> oci::Hook {
        let script = format!(
            "echo > {}; until [ -e {} ]; do sleep 0.05; done",
            self.at("up").display(),
            self.at("go").display()
        );
        oci::Hook {
            Path: "/bin/busybox".into(),
            Args: ["sh", "-c", &script].map(String::from).to_vec(),
            Env: vec!["PATH=/bin".into()],
            Timeout: 120,
            ..Default::default()
        }
    }

    async fn reached(&self) {
        until("the hook runs", || async { self.at("up").exists() }).await;
    }

    fn open(&self) {
        std::fs::write(self.at("go"), "").unwrap();
    }
}

async fn until<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let start = Instant::now();
    while !condition().await {
        assert!(start.elapsed() < Duration::from_secs(60), "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A connection of its own, to be closed in the midst of things.
async fn connect(agent: &Agent) -> AgentServiceClient {
    let socket = agent.rootfs().parent().unwrap().join("agent.sock");
    let address = format!("unix://{}", socket.display());
    AgentServiceClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap())
}

/// Everything that can be done with a container.
async fn whole_life(agent: &Agent, id: &str) {
    let life = async {
        agent.run(id, &["sleep", "1000"]).await;
        assert_eq!(agent.shell(id, "e", "echo hello").await, ("hello\n".to_owned(), 0));
        let request = StatsContainerRequest { container_id: id.into(), ..Default::default() };
        agent.client.stats_container(context(), &request).await.unwrap();
        agent.signal(id, "", 15).await.unwrap();
        assert_eq!(agent.wait(id, "").await.unwrap(), 128 + 9);
        agent.remove(id).await.unwrap();
    };
    tokio::time::timeout(QUICK, life).await.expect("it is delayed");
}

fn create_request(id: &str, spec: oci::Spec) -> CreateContainerRequest {
    CreateContainerRequest { container_id: id.into(), OCI: MessageField::some(spec), ..Default::default() }
}

fn remove_request(id: &str, timeout: u32) -> RemoveContainerRequest {
    RemoveContainerRequest { container_id: id.into(), timeout, ..Default::default() }
}

#[tokio::test]
async fn a_container_whose_hook_sleeps_delays_no_other() {
    let agent = Arc::new(agent_or_skip!());
    let gate = Gate::new();
    let mut spec = agent.spec(&["true"]);
    spec.Hooks.mut_or_insert_default().CreateRuntime = vec![gate.hook()];
    let creating = Arc::clone(&agent);
    let slow = tokio::spawn(async move { creating.create("slow", spec).await });
    gate.reached().await;
    // A hundred at once on the slow one: all but the removals answer now.
    let requests: Vec<_> = (0..100)
        .map(|n| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move {
                match n % 5 {
                    0 => failed(agent.create("slow", agent.spec(&["true"])).await, Kind::AlreadyExists),
                    1 => failed(agent.start_container("slow").await, Kind::InvalidArgument),
                    2 => failed(agent.exec("slow", "e", process(&["true"])).await, Kind::InvalidArgument),
                    3 => failed(agent.wait("slow", "").await, Kind::InvalidArgument),
                    _ => agent.remove("slow").await.map(|()| String::new()).unwrap(),
                }
            })
        })
        .collect();
    whole_life(&agent, "quick").await;
    assert!(!slow.is_finished());
    for (n, request) in requests.into_iter().enumerate() {
        if n % 5 == 4 {
            assert!(!request.is_finished(), "a removal waits for the creation");
            request.abort();
        } else {
            tokio::time::timeout(QUICK, request).await.expect("it waits for the slow one").unwrap();
        }
    }
    gate.open();
    slow.await.unwrap().unwrap();
    // The removals go on without those who asked.
    until("the container is gone", || async { agent.wait("slow", "").await.is_err() }).await;
}

#[tokio::test]
async fn starts_and_ends_that_take_long_delay_no_other() {
    let agent = Arc::new(agent_or_skip!());
    let (starting, ending) = (Gate::new(), Gate::new());
    let mut spec = agent.spec(&["sleep", "1000"]);
    spec.Hooks.mut_or_insert_default().Poststart = vec![starting.hook()];
    spec.Hooks.mut_or_insert_default().Poststop = vec![ending.hook()];
    agent.create("slow", spec).await.unwrap();
    let slow = Arc::clone(&agent);
    let start = tokio::spawn(async move { slow.start_container("slow").await });
    starting.reached().await;
    whole_life(&agent, "quick").await;
    // Not even one on the same container.
    assert_eq!(agent.shell("slow", "e", "echo in").await.0, "in\n");
    assert!(!start.is_finished());
    starting.open();
    start.await.unwrap().unwrap();
    let slow = Arc::clone(&agent);
    let removal = tokio::spawn(async move { slow.remove("slow").await });
    ending.reached().await;
    whole_life(&agent, "quick").await;
    assert!(!removal.is_finished());
    ending.open();
    removal.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_creation_that_nobody_waits_for_is_finished_and_can_be_removed() {
    let agent = agent_or_skip!();
    for deadline in [false, true] {
        let gate = Gate::new();
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Hooks.mut_or_insert_default().CreateRuntime = vec![gate.hook()];
        let request = create_request("c1", spec);
        let client = connect(&agent).await;
        if deadline {
            let short = with_duration(Duration::from_millis(300));
            client.create_container(short, &request).await.unwrap_err();
            gate.reached().await;
        } else {
            let call = tokio::spawn(async move { client.create_container(context(), &request).await });
            gate.reached().await;
            call.abort();
        }
        failed(agent.create("c1", agent.spec(&["true"])).await, Kind::AlreadyExists);
        gate.open();
        until("it is there", || async { agent.start_container("c1").await.is_ok() }).await;
        assert_eq!(agent.shell("c1", "e", "echo in").await.0, "in\n");
        agent.remove("c1").await.unwrap();
        agent.run("c1", &["true"]).await;
        agent.remove("c1").await.unwrap();
    }
}

#[tokio::test]
async fn a_removal_that_nobody_waits_for_goes_on_and_can_be_asked_for_again() {
    let agent = agent_or_skip!();
    let gate = Gate::new();
    let mut spec = agent.spec(&["sleep", "1000"]);
    spec.Hooks.mut_or_insert_default().Poststop = vec![gate.hook()];
    agent.create("c1", spec).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let client = connect(&agent).await;
    let call =
        tokio::spawn(async move { client.remove_container(context(), &remove_request("c1", 0)).await });
    gate.reached().await;
    call.abort();
    // The same again waits for the same removal, as long as it likes.
    let text = failed(
        agent.client.remove_container(context(), &remove_request("c1", 1)).await,
        Kind::DeadlineExceeded,
    );
    assert!(text.contains("its removal goes on"), "{text}");
    failed(agent.create("c1", agent.spec(&["true"])).await, Kind::AlreadyExists);
    gate.open();
    agent.client.remove_container(context(), &remove_request("c1", 60)).await.unwrap();
    agent.run("c1", &["true"]).await;
}

/// A file system that never answers, mounted for this test's thread and what it starts.
struct Hanging {
    _device: File,
    directory: tempfile::TempDir,
}

impl Hanging {
    /// Below `directory/fuse`; `None` where there is no FUSE.
    fn mount() -> Option<Hanging> {
        use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let directory = tempfile::tempdir().unwrap();
        let point = directory.path().join("fuse");
        std::fs::create_dir(&point).unwrap();
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let options = std::ffi::CString::new(options).unwrap();
        mount("hanging", &point, "fuse", MountFlags::empty(), options.as_c_str()).ok()?;
        Some(Hanging { _device: device, directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Every request to it fails from now on.
    fn abort(self) {
        rustix::mount::unmount(self.path().join("fuse"), rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[tokio::test]
async fn execs_that_hang_delay_no_other_container_and_obey_what_came_meanwhile() {
    if let Some(reason) = cannot_run() {
        eprintln!("skipped: {reason}");
        return;
    }
    let Some(hanging) = Hanging::mount() else {
        eprintln!("skipped: there is no FUSE");
        return;
    };
    let agent = Arc::new(Agent::start().await);
    for id in ["hung", "killed"] {
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Mounts.push(oci::Mount {
            destination: "/mnt".into(),
            source: hanging.path().to_str().unwrap().into(),
            type_: "bind".into(),
            options: vec!["rbind".into()],
            ..Default::default()
        });
        agent.create(id, spec).await.unwrap();
        agent.start_container(id).await.unwrap();
    }
    let hang = |id: &'static str, exec: String| {
        let agent = Arc::clone(&agent);
        let process = oci::Process { Cwd: "/mnt/fuse".into(), ..process(&["true"]) };
        tokio::spawn(async move { agent.exec(id, &exec, process).await })
    };
    let execs: Vec<_> = ["hung", "killed"]
        .into_iter()
        .flat_map(|id| (0..40).map(move |n| (id, n)))
        .map(|(id, n)| hang(id, format!("h{n}")))
        .collect();
    until("the first ones hang", || async { children(agent.pid()) >= 2 + 2 * 16 }).await;
    whole_life(&agent, "quick").await;
    assert!(execs.iter().all(|exec| !exec.is_finished()));

    // One that is healthy has to wait for its turn, and its client does not wait for that.
    let request = ExecProcessRequest {
        container_id: "hung".into(),
        exec_id: "late".into(),
        process: MessageField::some(process(&["sleep", "1000"])),
        ..Default::default()
    };
    let short = with_duration(Duration::from_millis(300));
    agent.client.exec_process(short, &request).await.unwrap_err();
    failed(agent.exec("hung", "late", process(&["true"])).await, Kind::AlreadyExists);
    let waiting = Arc::clone(&agent);
    let wait = tokio::spawn(async move { waiting.wait("hung", "late").await });
    agent.signal("hung", "late", 9).await.unwrap();

    // A container can be removed whatever hangs in it.
    tokio::time::timeout(QUICK, agent.remove("killed")).await.expect("the removal hangs").unwrap();
    hanging.abort();
    for exec in execs {
        exec.await.unwrap().unwrap_err();
    }
    assert_eq!(wait.await.unwrap().unwrap(), 128 + 9, "the signal was kept for it");
    assert_eq!(agent.shell("hung", "again", "echo in").await.0, "in\n");
    agent.remove("hung").await.unwrap();
    until("no child is left", || async { children(agent.pid()) == 0 }).await;
}

fn children(pid: u32) -> usize {
    let stat = |entry: std::fs::DirEntry| std::fs::read_to_string(entry.path().join("stat")).ok();
    let parent = |stat: String| stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse::<u32>().ok();
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .filter_map(stat)
        .filter_map(parent)
        .filter(|parent| *parent == pid)
        .count()
}
