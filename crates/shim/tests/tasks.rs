//! Whole lives of containers and pods, through the real server, with the agent as a plain process instead of a VM.

#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod support;

use std::{fs::File, io::Read, time::Duration};

use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, CreateTaskRequest, DeleteRequest,
        ExecProcessRequest, KillRequest, PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StateRequest, Status, WaitRequest,
    },
    protobuf::well_known_types::any::Any,
};
use protobuf::MessageField;
use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::json;
use support::{BOUND, Containerd, Shim, agent, busybox, code, context, ended, skip, spec, text};
use tokio::time;

/// The calls of one container, short enough to read a test as a story.
struct Task<'a> {
    containerd: &'a Containerd,
    shim: Shim,
    id: String,
}

impl<'a> Task<'a> {
    async fn new(
        containerd: &'a Containerd,
        id: &str,
        args: &[&str],
        annotations: serde_json::Value,
    ) -> Task<'a> {
        containerd.make_bundle(id, &spec(args, annotations));
        let shim = containerd.start(id).await;
        Task { containerd, shim, id: id.into() }
    }

    fn request(&self) -> CreateTaskRequest {
        let bundle = self.containerd.bundle(&self.id).display().to_string();
        CreateTaskRequest { id: self.id.clone(), bundle, ..Default::default() }
    }

    async fn create(&self) {
        self.shim.tasks.create(context(), &self.request()).await.unwrap();
    }

    async fn start(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        self.shim.tasks.start(context(), &request).await.map(|response| response.pid)
    }

    async fn exec(&self, exec_id: &str, args: &[&str], stdout: &str) -> ttrpc::Result<()> {
        let process = json!({"user": {"uid": 0, "gid": 0}, "args": args, "env": ["PATH=/bin"], "cwd": "/"});
        let process =
            Any { type_url: "types/Process".into(), value: process.to_string().into(), ..Default::default() };
        let request = ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            stdout: stdout.into(),
            spec: MessageField::some(process),
            ..Default::default()
        };
        self.shim.tasks.exec(context(), &request).await.map(drop)
    }

    async fn wait(&self, exec_id: &str) -> u32 {
        let request = WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let response = self.shim.tasks.wait(context(), &request).await.unwrap();
        assert!(response.exited_at.seconds > 1_600_000_000);
        response.exit_status
    }

    async fn kill(&self, signal: Signal) -> ttrpc::Result<()> {
        let signal = u32::try_from(signal.as_raw()).unwrap();
        let request = KillRequest { id: self.id.clone(), signal, ..Default::default() };
        self.shim.tasks.kill(context(), &request).await.map(drop)
    }

    async fn state(&self) -> Status {
        let request = StateRequest { id: self.id.clone(), ..Default::default() };
        self.shim.tasks.state(context(), &request).await.unwrap().status.unwrap()
    }

    async fn delete(&self, exec_id: &str) -> ttrpc::Result<u32> {
        let request = DeleteRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        self.shim.tasks.delete(context(), &request).await.map(|response| response.exit_status)
    }

    async fn shutdown(&self) {
        let request = ShutdownRequest { id: self.id.clone(), ..Default::default() };
        self.shim.tasks.shutdown(context(), &request).await.unwrap();
    }

    /// The end of the server, and what it must not leave.
    async fn gone(&self) {
        ended(self.containerd.server_pid(&self.id)).await;
        assert!(!self.shim.path.exists());
        assert_eq!(self.containerd.leftovers(), Vec::<std::path::PathBuf>::new());
    }
}

async fn containerd() -> Option<Containerd> {
    if skip() || busybox().is_none() {
        return None;
    }
    Some(Containerd::local(&agent()?).await)
}

fn read_to(mut file: File, want: &str) -> String {
    let mut text = vec![0; want.len()];
    file.read_exact(&mut text).unwrap();
    String::from_utf8(text).unwrap()
}

#[tokio::test]
async fn a_container_that_ends_at_once_has_its_events_in_order() {
    let Some(containerd) = containerd().await else { return };
    for round in 0..5 {
        let id = format!("fast{round}");
        let before = containerd.events().len();
        let task =
            Task::new(&containerd, &id, &["sh", "-c", "echo out; echo err >&2; exit 7"], json!({})).await;
        let (stdout, out) = containerd.fifo(&format!("{id}-out"));
        let (stderr, err) = containerd.fifo(&format!("{id}-err"));
        task.shim
            .tasks
            .create(context(), &CreateTaskRequest { stdout, stderr, ..task.request() })
            .await
            .unwrap();
        let (code, started) = tokio::join!(task.wait(""), task.start(""));
        let pid = started.unwrap();
        assert_eq!(code, 7);
        assert_eq!((read_to(out, "out\n").as_str(), read_to(err, "err\n").as_str()), ("out\n", "err\n"));
        assert_eq!(task.wait("").await, 7, "asked again");
        assert_eq!(task.delete("").await.unwrap(), 7);
        assert!(
            test_kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()).is_err(),
            "Delete waits for the VM"
        );
        task.shutdown().await;
        let events = containerd.events()[before..].to_vec();
        let want = [
            format!("create {id}"),
            format!("start {id}"),
            format!("exit {id} {id} 7"),
            format!("delete {id}  7"),
        ];
        assert_eq!(events, want);
        task.gone().await;
    }
}

#[tokio::test]
async fn further_processes_have_lives_of_their_own() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["sleep", "300"], json!({})).await;
    task.create().await;
    let pid = task.start("").await.unwrap();
    assert_eq!(task.state().await, Status::RUNNING);

    let (stdout, out) = containerd.fifo("exec-out");
    task.exec("e1", &["sh", "-c", "echo hi; exit 3"], &stdout).await.unwrap();
    assert_eq!(code(task.exec("e1", &["true"], "").await), ttrpc::Code::ALREADY_EXISTS);
    let (code_, started) = tokio::join!(task.wait("e1"), task.start("e1"));
    assert_eq!((code_, started.unwrap()), (3, pid));
    assert_eq!(read_to(out, "hi\n"), "hi\n");
    assert_eq!(code(task.start("e1").await), ttrpc::Code::FAILED_PRECONDITION);
    assert_eq!(task.delete("e1").await.unwrap(), 3);
    assert_eq!(code(task.delete("e1").await), ttrpc::Code::NOT_FOUND);

    task.exec("e2", &["sleep", "300"], "").await.unwrap();
    task.start("e2").await.unwrap();
    assert_eq!(code(task.delete("e2").await), ttrpc::Code::FAILED_PRECONDITION);

    let missing = {
        task.exec("e3", &["nosuch"], "").await.unwrap();
        task.start("e3").await
    };
    assert!(text(missing).contains(r#"exec: "nosuch": executable file not found in $PATH"#));
    assert_eq!(task.wait("e3").await, 127);
    task.delete("e3").await.unwrap();

    task.kill(Signal::KILL).await.unwrap();
    assert_eq!(task.wait("").await, 137);
    assert_eq!(task.delete("").await.unwrap(), 137);
    task.shutdown().await;
    let seen = containerd.events();
    let of = |id: &str| -> Vec<String> { seen.iter().filter(|line| line.contains(id)).cloned().collect() };
    assert_eq!(of(" e1"), ["exec-added box e1", "exec-started box e1", "exit box e1 3", "delete box e1 3"]);
    assert_eq!(of(" e2"), ["exec-added box e2", "exec-started box e2", "exit box e2 137"]);
    assert_eq!(of(" e3"), ["exec-added box e3", "delete box e3 127"]);
    task.gone().await;
}

#[tokio::test]
async fn every_call_has_its_answer() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["cat"], json!({})).await;
    let (stdin, input) = containerd.fifo("in");
    let (stdout, out) = containerd.fifo("out");
    let tasks = &task.shim.tasks;
    let id = || "box".to_owned();
    let request = CreateTaskRequest { stdin: stdin.clone(), stdout, ..task.request() };
    tasks.create(context(), &request).await.unwrap();
    assert_eq!(code(tasks.create(context(), &request).await), ttrpc::Code::ALREADY_EXISTS);
    assert_eq!(task.state().await, Status::CREATED);
    let pid = task.start("").await.unwrap();

    let connected =
        tasks.connect(context(), &ConnectRequest { id: id(), ..Default::default() }).await.unwrap();
    assert_eq!(connected.task_pid, pid);
    let pids = tasks.pids(context(), &PidsRequest { id: id(), ..Default::default() }).await.unwrap();
    assert_eq!(pids.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [pid]);
    let state = tasks.state(context(), &StateRequest { id: id(), ..Default::default() }).await.unwrap();
    assert_eq!((state.stdin, state.pid), (stdin, pid));
    let checkpoint =
        tasks.checkpoint(context(), &CheckpointTaskRequest { id: id(), ..Default::default() }).await;
    assert_eq!(code(checkpoint), ttrpc::Code::UNIMPLEMENTED);
    let resize = ResizePtyRequest { id: id(), exec_id: "nobody".into(), ..Default::default() };
    assert_eq!(code(tasks.resize_pty(context(), &resize).await), ttrpc::Code::NOT_FOUND);
    let other = KillRequest { id: "other".into(), signal: 9, ..Default::default() };
    assert_eq!(code(tasks.kill(context(), &other).await), ttrpc::Code::NOT_FOUND);

    use std::io::Write;
    (&input).write_all(b"to cat\n").unwrap();
    assert_eq!(read_to(out, "to cat\n"), "to cat\n");
    drop(input);
    tasks.close_io(context(), &CloseIORequest { id: id(), stdin: true, ..Default::default() }).await.unwrap();
    assert_eq!(task.wait("").await, 0);
    assert_eq!(task.state().await, Status::STOPPED);
    task.kill(Signal::KILL).await.expect("asked to end what has ended");
    task.kill(Signal::TERM).await.expect("asked to end what has ended");
    assert_eq!(text(task.kill(Signal::HUP).await), "process already finished");
    assert_eq!(code(task.exec("late", &["true"], "").await), ttrpc::Code::FAILED_PRECONDITION);
    task.delete("").await.unwrap();
    assert_eq!(code(task.delete("").await), ttrpc::Code::NOT_FOUND);
    task.shutdown().await;
    task.gone().await;
}

#[tokio::test]
async fn a_paused_container_says_so() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["sleep", "300"], json!({})).await;
    task.create().await;
    task.start("").await.unwrap();
    let pause = PauseRequest { id: "box".into(), ..Default::default() };
    if let Err(error) = task.shim.tasks.pause(context(), &pause).await {
        // A plain process has no freezer everywhere; what counts is an honest answer.
        assert_eq!(code(Err::<(), _>(error)), ttrpc::Code::UNIMPLEMENTED);
    } else {
        assert_eq!(task.state().await, Status::PAUSED);
        task.shim
            .tasks
            .resume(context(), &ResumeRequest { id: "box".into(), ..Default::default() })
            .await
            .unwrap();
        assert_eq!(task.state().await, Status::RUNNING);
        assert_eq!(containerd.events()[2..], ["paused box", "resumed box"]);
    }
    task.delete("").await.unwrap();
    task.shutdown().await;
    task.gone().await;
}

#[tokio::test]
async fn a_missing_command_is_told_in_known_words() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["nosuch"], json!({})).await;
    let outcome = match task.shim.tasks.create(context(), &task.request()).await {
        Ok(_) => {
            let outcome = task.start("").await;
            task.delete("").await.unwrap();
            outcome
        }
        Err(error) => Err(error),
    };
    let text = text(outcome);
    assert!(text.contains(r#"exec: "nosuch": executable file not found in $PATH"#), "{text}");
    task.shutdown().await;
    assert!(!containerd.events().iter().any(|line| line.starts_with("start")));
    task.gone().await;
}

#[tokio::test]
async fn a_container_can_be_killed_before_it_is_started() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["sleep", "300"], json!({})).await;
    task.create().await;
    let (code_, killed) = tokio::join!(task.wait(""), task.kill(Signal::KILL));
    killed.unwrap();
    assert_eq!(code_, 137);
    assert_eq!(task.delete("").await.unwrap(), 137);
    task.shutdown().await;
    task.gone().await;
}

#[tokio::test]
async fn a_pod_lives_and_dies_with_its_sandbox() {
    let Some(containerd) = containerd().await else { return };
    let sandbox =
        json!({"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "pod"});
    let member =
        json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "pod"});
    let pod = Task::new(&containerd, "pod", &["sleep", "300"], sandbox).await;
    pod.create().await;
    let pid = pod.start("").await.unwrap();
    let one = Task::new(&containerd, "one", &["sleep", "300"], member.clone()).await;
    let two = Task::new(&containerd, "two", &["sleep", "300"], member).await;
    for task in [&one, &two] {
        assert_eq!(task.shim.path, pod.shim.path);
        task.create().await;
        assert_eq!(task.start("").await.unwrap(), pid, "one VM");
    }
    one.kill(Signal::KILL).await.unwrap();
    assert_eq!(one.wait("").await, 137);
    assert_eq!(one.delete("").await.unwrap(), 137);
    one.shutdown().await;
    assert_eq!(two.state().await, Status::RUNNING, "the end of one is not the end of the pod");

    pod.kill(Signal::KILL).await.unwrap();
    assert_eq!(pod.wait("").await, 137);
    // Killed by the guest's agent on its way down, or gone with it: the guest's last word may not have arrived.
    let code = two.wait("").await;
    assert!([137, 255].contains(&code), "and this one is: {code}");
    two.delete("").await.unwrap();
    pod.delete("").await.unwrap();
    pod.shutdown().await;
    let seen = containerd.events();
    for (id, code) in [("pod", 137), ("one", 137), ("two", code)] {
        let lives: Vec<_> = seen.iter().filter(|line| line.split(' ').nth(1) == Some(id)).cloned().collect();
        let want = ["create", "start"].map(|event| format!("{event} {id}")).into_iter();
        let end = [format!("exit {id} {id} {code}"), format!("delete {id}  {code}")];
        assert_eq!(lives, want.chain(end).collect::<Vec<_>>());
    }
    pod.gone().await;
}

#[tokio::test]
async fn a_killed_vm_ends_its_containers() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["sleep", "300"], json!({})).await;
    task.create().await;
    let pid = task.start("").await.unwrap();
    task.exec("e", &["sleep", "300"], "").await.unwrap();
    task.start("e").await.unwrap();
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
    assert_eq!(task.wait("").await, 137);
    assert_eq!(task.wait("e").await, 137);
    task.kill(Signal::KILL).await.unwrap();
    task.delete("e").await.unwrap();
    assert_eq!(task.delete("").await.unwrap(), 137);
    task.shutdown().await;
    let seen = containerd.events();
    assert_eq!(seen.iter().filter(|line| *line == "exit box box 137").count(), 1, "{seen:?}");
    assert_eq!(seen.iter().filter(|line| *line == "exit box e 137").count(), 1, "{seen:?}");
    task.gone().await;
}

#[tokio::test]
async fn a_create_that_nobody_waits_for_leaves_nothing() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["sleep", "300"], json!({})).await;
    let impatient = || ttrpc::context::with_duration(Duration::from_millis(1));
    task.shim.tasks.create(impatient(), &task.request()).await.unwrap_err();
    // What containerd does then, and it does not wait for this either.
    let request = DeleteRequest { id: "box".into(), ..Default::default() };
    let _ = task.shim.tasks.delete(impatient(), &request).await;
    task.shutdown().await;
    task.gone().await;
}

#[tokio::test]
async fn delete_ends_the_vm_of_a_killed_server() {
    let Some(containerd) = containerd().await else { return };
    let task = Task::new(&containerd, "box", &["sleep", "300"], json!({})).await;
    task.create().await;
    let vm = Pid::from_raw(i32::try_from(task.start("").await.unwrap()).unwrap()).unwrap();
    kill_process(containerd.server_pid("box"), Signal::KILL).unwrap();
    ended(containerd.server_pid("box")).await;
    let output = time::timeout(BOUND, async { containerd.delete("box") }).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    ended(vm).await;
    task.gone().await;
}
