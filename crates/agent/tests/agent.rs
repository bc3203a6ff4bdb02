//! The real agent as a plain process, driven by the generated client over its socket: the life of containers and
//! processes, their streams and exits, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::{sync::Arc, time::Duration};

use bulkhead_protocol::{agent::*, health::CheckRequest, protobuf::MessageField, status::Kind};
use support::{Agent, cannot_run, context, failed, process};

macro_rules! agent_or_skip {
    () => {{
        if let Some(reason) = cannot_run() {
            eprintln!("skipped: {reason}");
            return;
        }
        Agent::start().await
    }};
}

#[tokio::test]
async fn it_is_healthy_and_tells_what_it_can() {
    let agent = agent_or_skip!();
    let check = CheckRequest::new();
    agent.health.check(context(), &check).await.unwrap();
    assert_eq!(
        agent.health.version(context(), &check).await.unwrap().agent_version,
        env!("CARGO_PKG_VERSION")
    );

    let details = agent.client.get_guest_details(context(), &GuestDetailsRequest::new()).await.unwrap();
    let details = details.agent_details.unwrap();
    assert!(!details.init_daemon && details.supports_seccomp);
    // By name: hosts and people look for theirs.
    let drivers = "9p bind blk ephemeral erofs.multi-layer local mmioblk nvdimm overlayfs scsi virtio-fs watchable-bind";
    assert_eq!(details.storage_handlers.join(" "), drivers);

    let metrics = agent.client.get_metrics(context(), &GetMetricsRequest::new()).await.unwrap().metrics;
    for stage in ["started", "listening"] {
        assert!(metrics.contains(&format!("bulkhead_agent_boot_seconds{{stage=\"{stage}\"}} ")), "{metrics}");
    }

    // The machine is not its own.
    let time = SetGuestDateTimeRequest { Sec: 1, ..Default::default() };
    failed(agent.client.set_guest_date_time(context(), &time).await, Kind::FailedPrecondition);
    assert!(agent.destroy().await.success());
}

#[tokio::test]
async fn a_container_lives_and_dies_and_its_exit_is_told_to_all() {
    let agent = Arc::new(agent_or_skip!());
    agent.create("c1", agent.spec(&["sh", "-c", "echo out; echo err >&2; exit 42"])).await.unwrap();
    let early: Vec<_> = (0..5)
        .map(|n| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move { agent.wait("c1", if n % 2 == 0 { "" } else { "c1" }).await.unwrap() })
        })
        .collect();
    agent.start_container("c1").await.unwrap();
    for wait in early {
        assert_eq!(wait.await.unwrap(), 42);
    }
    // After the exit everything is still there to be had.
    assert_eq!(agent.wait("c1", "").await.unwrap(), 42);
    assert_eq!(agent.stdout("c1", "").await, "out\n");
    assert_eq!(agent.stderr("c1", "c1").await, "err\n");
    assert_eq!(agent.stdout("c1", "").await, "");
    assert_eq!(agent.wait("c1", "").await.unwrap(), 42);
    for signal in [15, 9] {
        agent.signal("c1", "", signal).await.unwrap();
    }
    agent.remove("c1").await.unwrap();
    agent.remove("c1").await.unwrap();
    failed(agent.wait("c1", "").await, Kind::InvalidArgument);
    // The id is free again.
    agent.run("c1", &["true"]).await;
    assert_eq!(agent.wait("c1", "").await.unwrap(), 0);
}

#[tokio::test]
async fn a_container_that_never_started_can_be_removed() {
    let agent = Arc::new(agent_or_skip!());
    agent.create("c1", agent.spec(&["sleep", "1000"])).await.unwrap();
    let waiting = Arc::clone(&agent);
    let wait = tokio::spawn(async move { waiting.wait("c1", "").await });
    // Until its request is there.
    agent.health.check(context(), &CheckRequest::new()).await.unwrap();
    agent.remove("c1").await.unwrap();
    assert_eq!(wait.await.unwrap().unwrap(), 128 + 9);
    failed(agent.start_container("c1").await, Kind::InvalidArgument);
}

#[tokio::test]
async fn removing_kills_and_leaves_nothing() {
    let agent = agent_or_skip!();
    let mut descriptors = 0;
    for round in 0..5 {
        // The first container leaves what serves all of them.
        if round == 1 {
            descriptors = agent.settled_descriptors().await;
        }
        let id = format!("round{round}");
        agent.run(&id, &["sh", "-c", "sleep 1000 & sleep 1000"]).await;
        agent.exec(&id, "e", process(&["sleep", "1000"])).await.unwrap();
        agent.remove(&id).await.unwrap();
    }
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", agent.pid())).unwrap();
    assert_eq!(children, "", "no process is left");
    assert_eq!(agent.settled_descriptors().await, descriptors);
}

#[tokio::test]
async fn ids_are_taken_once_and_unknown_ones_are_refused() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    failed(agent.create("c1", agent.spec(&["true"])).await, Kind::AlreadyExists);
    agent.exec("c1", "e1", process(&["cat"])).await.unwrap();
    failed(agent.exec("c1", "e1", process(&["true"])).await, Kind::AlreadyExists);
    failed(agent.exec("c1", "", process(&["true"])).await, Kind::InvalidArgument);
    failed(agent.exec("c1", "c1", process(&["true"])).await, Kind::AlreadyExists);
    // What holds the ids is unharmed.
    agent.write("c1", "e1", b"still here").await.unwrap();
    agent.close("c1", "e1").await.unwrap();
    assert_eq!(agent.stdout("c1", "e1").await, "still here");
    assert_eq!(agent.wait("c1", "e1").await.unwrap(), 0);
    assert_eq!(agent.shell("c1", "e2", "echo $$").await.1, 0);

    for id in ["", "c", "../c", "a b"] {
        failed(agent.create(id, agent.spec(&["true"])).await, Kind::InvalidArgument);
    }
    failed(agent.start_container("nobody").await, Kind::InvalidArgument);
    failed(agent.wait("nobody", "").await, Kind::InvalidArgument);
    failed(agent.signal("nobody", "", 9).await, Kind::InvalidArgument);
    failed(agent.wait("c1", "nobody").await, Kind::NotFound);
    failed(agent.signal("c1", "nobody", 15).await, Kind::NotFound);
    failed(agent.read("c1", "nobody").await, Kind::NotFound);
    failed(agent.write("c1", "nobody", b"x").await, Kind::NotFound);
    failed(agent.signal("c1", "", 65).await, Kind::InvalidArgument);
}

#[tokio::test]
async fn a_command_that_is_missing_is_told_in_the_usual_words() {
    let agent = agent_or_skip!();
    let missing = "exec: \"foo\": executable file not found in $PATH";
    assert_eq!(failed(agent.create("c1", agent.spec(&["foo"])).await, Kind::InvalidArgument), missing);
    let path = "exec: \"/foo\": stat /foo: no such file or directory";
    assert_eq!(failed(agent.create("c1", agent.spec(&["/foo"])).await, Kind::InvalidArgument), path);
    let denied = "exec: \"/bin/data\": permission denied";
    assert_eq!(failed(agent.create("c1", agent.spec(&["/bin/data"])).await, Kind::PermissionDenied), denied);

    agent.run("c1", &["sleep", "1000"]).await;
    for (command, kind, text) in [
        ("foo", Kind::InvalidArgument, missing),
        ("/foo", Kind::InvalidArgument, path),
        ("/bin/data", Kind::PermissionDenied, denied),
    ] {
        assert_eq!(failed(agent.exec("c1", "e1", process(&[command])).await, kind), text);
        failed(agent.wait("c1", "e1").await, Kind::NotFound);
    }
    // A failed exec does not keep its id.
    agent.exec("c1", "e1", process(&["true"])).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await.unwrap(), 0);
}

#[tokio::test]
async fn signals_reach_whom_they_are_meant_for() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    agent.exec("c1", "e1", process(&["sleep", "1000"])).await.unwrap();
    agent.exec("c1", "e2", process(&["sleep", "1000"])).await.unwrap();
    agent.signal("c1", "e1", 15).await.unwrap();
    assert_eq!(agent.wait("c1", "e1").await.unwrap(), 128 + 15);
    // A real-time signal.
    agent.signal("c1", "e2", 34).await.unwrap();
    assert_eq!(agent.wait("c1", "e2").await.unwrap(), 128 + 34);
    // The kernel drops SIGTERM to an init without a handler.
    agent.signal("c1", "c1", 15).await.unwrap();
    assert_eq!(agent.wait("c1", "").await.unwrap(), 128 + 9);

    agent.run("c2", &["sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done"]).await;
    assert_eq!(agent.read("c2", "").await.unwrap(), b"ready\n");
    agent.signal("c2", "", 15).await.unwrap();
    assert_eq!(agent.wait("c2", "").await.unwrap(), 7);

    agent.run("c3", &["sleep", "1000"]).await;
    agent.exec("c3", "e1", process(&["sleep", "1000"])).await.unwrap();
    agent.signal("c3", "", 9).await.unwrap();
    assert_eq!(agent.wait("c3", "").await.unwrap(), 128 + 9);
    assert_eq!(agent.wait("c3", "e1").await.unwrap(), 128 + 9);
}

#[tokio::test]
async fn standard_input_goes_in_whole_and_ends() {
    let agent = Arc::new(agent_or_skip!());
    agent.run("c1", &["sleep", "1000"]).await;
    agent.exec("c1", "sum", process(&["sh", "-c", "wc -c; echo done"])).await.unwrap();
    let chunk = vec![b'x'; 1 << 20];
    for _ in 0..8 {
        assert_eq!(agent.write("c1", "sum", &chunk).await.unwrap(), 1 << 20);
    }
    // Empty data is the end, as is CloseStdin, again and again.
    assert_eq!(agent.write("c1", "sum", b"").await.unwrap(), 0);
    agent.close("c1", "sum").await.unwrap();
    assert_eq!(agent.stdout("c1", "sum").await, format!("{}\ndone\n", 8 << 20));
    failed(agent.write("c1", "sum", b"x").await, Kind::FailedPrecondition);

    // A read waits for its first byte, and a write that nobody reads ends with the process.
    agent.exec("c1", "deaf", process(&["sleep", "1000"])).await.unwrap();
    let writing = Arc::clone(&agent);
    let write = tokio::spawn(async move { writing.write("c1", "deaf", &vec![0; 1 << 20]).await });
    let reading = Arc::clone(&agent);
    let read = tokio::spawn(async move { reading.read("c1", "deaf").await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!write.is_finished() && !read.is_finished());
    agent.signal("c1", "deaf", 9).await.unwrap();
    failed(write.await.unwrap(), Kind::FailedPrecondition);
    assert_eq!(read.await.unwrap().unwrap(), b"");
}

#[tokio::test]
async fn a_terminal_has_a_size_an_end_of_input_and_one_output() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    let mut shell =
        process(&["sh", "-c", "stty size; read line; stty size; echo \"got $line\" >&2; cat; exit 5"]);
    shell.Terminal = true;
    shell.ConsoleSize =
        MessageField::some(bulkhead_protocol::oci::Box { Height: 33, Width: 99, ..Default::default() });
    agent.exec("c1", "tty", shell).await.unwrap();
    assert_eq!(agent.read("c1", "tty").await.unwrap(), b"33 99\r\n");
    let size = TtyWinResizeRequest {
        container_id: "c1".into(),
        exec_id: "tty".into(),
        row: 44,
        column: 111,
        ..Default::default()
    };
    agent.client.tty_win_resize(context(), &size).await.unwrap();
    agent.write("c1", "tty", b"hello\nbegun").await.unwrap();
    agent.close("c1", "tty").await.unwrap();
    let output = agent.stdout("c1", "tty").await;
    assert!(output.contains("44 111\r\n") && output.contains("got hello\r\n"), "{output:?}");
    // Typed and echoed, and then copied by cat when the line was handed over.
    assert!(output.matches("begun").count() == 2, "{output:?}");
    assert_eq!(agent.wait("c1", "tty").await.unwrap(), 5);
    assert_eq!(agent.stderr("c1", "tty").await, "");
    failed(agent.client.tty_win_resize(context(), &size).await, Kind::FailedPrecondition);
}

#[tokio::test]
async fn a_background_process_does_not_keep_the_output_open() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    agent.exec("c1", "e1", process(&["sh", "-c", "sleep 1000 & echo hi"])).await.unwrap();
    assert_eq!(agent.stdout("c1", "e1").await, "hi\n");
    assert_eq!(agent.wait("c1", "e1").await.unwrap(), 0);
}

#[tokio::test]
async fn two_hundred_execs_lose_no_byte_and_no_exit() {
    let agent = Arc::new(agent_or_skip!());
    agent.run("c1", &["sleep", "1000"]).await;
    agent.shell("c1", "first", "echo").await;
    assert_eq!(agent.stderr("c1", "first").await, "");
    let descriptors = agent.descriptors();
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..8 {
        let agent = Arc::clone(&agent);
        tasks.spawn(async move {
            for round in 0..25 {
                let id = format!("e{worker}-{round}");
                let line = format!("seq 1 2000; echo {id}; exit {}", round % 7);
                let (output, code) = agent.shell("c1", &id, &line).await;
                let expected: String = (1..=2000).map(|n| format!("{n}\n")).collect::<String>() + &id + "\n";
                assert_eq!(output, expected);
                assert_eq!(agent.stderr("c1", &id).await, "");
                assert_eq!(code, round % 7);
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
    assert_eq!(agent.wait("c1", "e0-3").await.unwrap(), 3, "an old exit is still known");
    assert_eq!(agent.descriptors(), descriptors);
}

#[tokio::test]
async fn exits_that_come_at_once_are_all_told() {
    let agent = Arc::new(agent_or_skip!());
    agent.run("c1", &["sleep", "1000"]).await;
    let mut tasks = tokio::task::JoinSet::new();
    for worker in 0..4 {
        let agent = Arc::clone(&agent);
        tasks.spawn(async move {
            for round in 0..25 {
                let id = format!("e{worker}-{round}");
                agent.exec("c1", &id, process(&["false"])).await.unwrap();
                assert_eq!(agent.wait("c1", &id).await.unwrap(), 1);
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
}

#[tokio::test]
async fn a_pod_shares_its_name_its_ipc_and_its_pids() {
    let agent = agent_or_skip!();
    let sandbox = CreateSandboxRequest {
        hostname: "bulkhead-pod".into(),
        dns: vec!["nameserver 192.0.2.1".into()],
        sandbox_id: "pause".into(),
        storages: vec![Storage {
            driver: "ephemeral".into(),
            source: "shm".into(),
            fstype: "tmpfs".into(),
            options: ["noexec", "nosuid", "nodev", "mode=1777", "size=1048576"].map(str::to_owned).to_vec(),
            mount_point: bulkhead_protocol::ports::GUEST_SHM.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    agent.client.create_sandbox(context(), &sandbox).await.unwrap();
    failed(agent.client.create_sandbox(context(), &sandbox).await, Kind::AlreadyExists);
    agent.run("pause", &["sleep", "1000"]).await;

    let mut spec = agent.spec(&["sleep", "1000"]);
    spec.Hostname = "a-member".into();
    spec.Mounts.push(bulkhead_protocol::oci::Mount {
        destination: "/dev/shm".into(),
        type_: "bind".into(),
        source: bulkhead_protocol::ports::GUEST_SHM.into(),
        options: vec!["rbind".into()],
        ..Default::default()
    });
    let request = CreateContainerRequest {
        container_id: "member".into(),
        OCI: MessageField::some(spec),
        sandbox_pidns: true,
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await.unwrap();
    agent.start_container("member").await.unwrap();

    let look = "hostname; readlink /proc/self/ns/ipc; readlink /proc/self/ns/net; readlink /proc/1/ns/pid";
    let (pause, _) = agent.shell("pause", "look", look).await;
    let (member, _) = agent.shell("member", "look", look).await;
    assert!(pause.starts_with("bulkhead-pod\n"), "{pause}");
    assert_eq!(pause, member);
    let (shm, _) = agent.shell("member", "shm", "grep ' /dev/shm ' /proc/self/mounts").await;
    for option in ["noexec", "nosuid", "nodev", "size=1024k"] {
        assert!(shm.contains(option), "{option} in {shm}");
    }
    let (processes, _) = agent.shell("member", "ps", "ps -o args").await;
    assert_eq!(processes.matches("sleep 1000").count(), 2, "{processes}");
    // A member's end leaves the others alone.
    agent.remove("member").await.unwrap();
    assert_eq!(agent.shell("pause", "alive", "echo yes").await.0, "yes\n");
    assert!(agent.destroy().await.success());
}

#[tokio::test]
async fn what_is_not_offered_is_refused_by_name() {
    let agent = agent_or_skip!();
    let storage = Storage { driver: "floppy".into(), mount_point: "/run/x".into(), ..Default::default() };
    let request = CreateContainerRequest {
        container_id: "c1".into(),
        OCI: MessageField::some(agent.spec(&["true"])),
        storages: vec![storage],
        ..Default::default()
    };
    let text = failed(agent.client.create_container(context(), &request).await, Kind::Unimplemented);
    assert!(text.contains("floppy"), "{text}");
    // The same again is the same error, and the id is free.
    failed(agent.client.create_container(context(), &request).await, Kind::Unimplemented);

    let devices = vec![Device { type_: "floppy".into(), ..Default::default() }];
    let request = CreateContainerRequest { devices, storages: Vec::new(), ..request };
    let text = failed(agent.client.create_container(context(), &request).await, Kind::Unimplemented);
    assert!(text.contains("floppy"), "{text}");

    let module = KernelModule { name: "no_such_module".into(), ..Default::default() };
    let sandbox = CreateSandboxRequest { kernel_modules: vec![module], ..Default::default() };
    let text = failed(agent.client.create_sandbox(context(), &sandbox).await, Kind::FailedPrecondition);
    assert!(text.contains("no_such_module"), "{text}");
    // A sandbox that failed can be made after all.
    agent.client.create_sandbox(context(), &CreateSandboxRequest::new()).await.unwrap();
    let reclaimer = MemAgentMemcgConfig::new();
    let text = failed(agent.client.mem_agent_memcg_set(context(), &reclaimer).await, Kind::Unimplemented);
    assert!(text.contains("reclaim"), "{text}");
}

#[tokio::test]
async fn the_end_takes_everything_along() {
    let agent = agent_or_skip!();
    let marker = format!("MARKER={}", agent.rootfs().display());
    let marked = |command: &[&str]| {
        let mut process = process(command);
        process.Env.push(marker.clone());
        process
    };
    let mut spec = agent.spec(&[]);
    spec.Process = MessageField::some(marked(&["sh", "-c", "sleep 1000 & sleep 1000"]));
    agent.create("c1", spec).await.unwrap();
    agent.start_container("c1").await.unwrap();
    agent.exec("c1", "e1", marked(&["sh", "-c", "sleep 1000 & echo up; sleep 1000"])).await.unwrap();
    agent.read("c1", "e1").await.unwrap();
    assert!(processes_with(&marker) >= 3);
    assert!(agent.destroy().await.success());
    assert_eq!(processes_with(&marker), 0);
}

/// How many processes of the machine have this in their environment.
fn processes_with(variable: &str) -> usize {
    let environment = |entry: std::fs::DirEntry| std::fs::read(entry.path().join("environ")).ok();
    let has =
        |environment: Vec<u8>| environment.split(|byte| *byte == 0).any(|entry| entry == variable.as_bytes());
    std::fs::read_dir("/proc")
        .unwrap()
        .filter_map(|entry| environment(entry.ok()?))
        .filter(|e| has(e.clone()))
        .count()
}
