//! Containers and their processes, beyond the plain life: what is shared between containers, users by name, and every
//! request in a state that it does not fit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "each file of tests uses a part")]
mod support;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_protocol::{Empty, agent::*, oci, protobuf::MessageField, status::Kind};
use support::{Agent, cannot_run, context, failed, process};

/// Long enough for everything but a hang.
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

/// A spec of a container that may mount, and has a name in its pod.
fn mounting(agent: &Agent, name: &str, script: &str) -> oci::Spec {
    let mut spec = agent.spec(&["sh", "-c", script]);
    let capabilities = spec.Process.as_mut().unwrap().Capabilities.as_mut().unwrap();
    for set in [&mut capabilities.Bounding, &mut capabilities.Effective, &mut capabilities.Permitted] {
        set.push("CAP_SYS_ADMIN".into());
    }
    spec.Annotations.insert("io.kubernetes.cri.container-name".into(), name.into());
    spec
}

fn share(source: (&str, &str), target: (&str, &str)) -> SharedMount {
    SharedMount {
        name: "shared".into(),
        src_ctr: source.0.into(),
        src_path: source.1.into(),
        dst_ctr: target.0.into(),
        dst_path: target.1.into(),
        ..Default::default()
    }
}

async fn create_sharing(
    agent: &Agent,
    id: &str,
    spec: oci::Spec,
    shared_mounts: Vec<SharedMount>,
) -> ttrpc::Result<Empty> {
    let request = CreateContainerRequest {
        container_id: id.into(),
        OCI: MessageField::some(spec),
        shared_mounts,
        ..Default::default()
    };
    agent.client.create_container(context(), &request).await
}

#[tokio::test]
async fn a_mount_of_one_container_is_shared_with_another_once_it_is_there() {
    let agent = Arc::new(agent_or_skip!());
    let script = "read go; mkdir -p /tmp/real; mount -t tmpfs none /tmp/real; echo one > /tmp/real/file; \
                  ln -s /tmp/real /tmp/link; touch /tmp/single; mount --bind /tmp/real/file /tmp/single; sleep 1000";
    agent.create("source", mounting(&agent, "maker", script)).await.unwrap();
    agent.start_container("source").await.unwrap();
    let creating = Arc::clone(&agent);
    let target = tokio::spawn(async move {
        let mounts = vec![
            // A link of the container, inside the container.
            share(("maker", "/tmp/link"), ("taker", "/tmp/taken/deep")),
            share(("maker", "/tmp/single"), ("taker", "/tmp/taken/single")),
            // Not meant for this one.
            share(("nobody", "/x"), ("somebody", "/x")),
        ];
        let spec = mounting(
            &creating,
            "taker",
            "cat /tmp/taken/deep/file /tmp/taken/single; grep -c /tmp/taken /proc/self/mountinfo",
        );
        create_sharing(&creating, "target", spec, mounts).await
    });
    // It waits, and nobody else does.
    assert_eq!(agent.shell("source", "e", "echo in").await.0, "in\n");
    assert!(!target.is_finished());
    agent.write("source", "", b"go\n").await.unwrap();
    target.await.unwrap().unwrap();
    agent.start_container("target").await.unwrap();
    assert_eq!(agent.stdout("target", "").await, "one\none\n2\n");
    // The mount outlives its maker, and nothing of it shows in the agent's own namespace.
    agent.remove("source").await.unwrap();
    let own = std::fs::read_to_string(format!("/proc/{}/mountinfo", agent.pid())).unwrap();
    assert!(!own.contains("/tmp/taken"), "{own}");
    agent.remove("target").await.unwrap();
}

#[tokio::test]
async fn a_mount_that_cannot_be_shared_is_an_error_that_leaves_nothing() {
    let agent = agent_or_skip!();
    agent.create("source", mounting(&agent, "maker", "read go")).await.unwrap();
    agent.start_container("source").await.unwrap();
    let create = async |mount| {
        let spec = mounting(&agent, "taker", "true");
        create_sharing(&agent, "target", spec, vec![mount]).await
    };
    let to = ("taker", "/tmp/t");
    let text = failed(create(share(("nobody", "/tmp"), to)).await, Kind::FailedPrecondition);
    assert!(text.contains("\"nobody\""), "{text}");
    failed(create(share(("maker", "tmp"), to)).await, Kind::InvalidArgument);
    failed(create(share(("maker", "/proc"), ("taker", "tmp"))).await, Kind::InvalidArgument);
    failed(create(share(("maker", "/proc"), ("taker", "/tmp\0"))).await, Kind::InvalidArgument);
    // A target that is a file where a directory is needed.
    failed(create(share(("maker", "/proc"), ("taker", "/bin/data"))).await, Kind::Internal);
    let text = failed(create(share(("maker", "/tmp/never"), to)).await, Kind::DeadlineExceeded);
    assert!(
        text.contains("nothing was mounted at \"/tmp/never\" of container \"source\" within 10 s"),
        "{text}"
    );
    // One that ends meanwhile is not waited for any longer.
    let ending = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        agent.write("source", "", b"go\n").await.unwrap();
    };
    let started = Instant::now();
    let (result, ()) = tokio::join!(create(share(("maker", "/tmp/never"), to)), ending);
    failed(result, Kind::FailedPrecondition);
    assert!(started.elapsed() < Duration::from_secs(8));
    failed(agent.wait("target", "").await, Kind::InvalidArgument);
    create_sharing(&agent, "target", mounting(&agent, "taker", "true"), Vec::new()).await.unwrap();
}

#[tokio::test]
async fn users_are_found_by_name_in_the_containers_own_files() {
    let agent = agent_or_skip!();
    let etc = agent.rootfs().join("etc");
    std::fs::write(etc.join("passwd"), "root:x:0:0::/root:/bin/sh\nme:x:1000:100::/home/me:/bin/sh\n")
        .unwrap();
    std::fs::write(etc.join("group"), "users:x:100:\nwheel:x:10:\nvideo:x:44:\n").unwrap();
    let user = |uid: &str, gid: &str, more: &[&str]| StringUser {
        uid: uid.into(),
        gid: gid.into(),
        additionalGids: more.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    };
    let create = async |id: &str, user| {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: MessageField::some(agent.spec(&["sh", "-c", "id; sleep 1000"])),
            string_user: MessageField::some(user),
            ..Default::default()
        };
        agent.client.create_container(context(), &request).await
    };
    create("c1", user("me", "", &["video"])).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let line = String::from_utf8(agent.read("c1", "").await.unwrap()).unwrap();
    assert_eq!(line, "uid=1000(me) gid=100(users) groups=44(video)\n");
    let exec = async |id: &str, user| {
        let request = ExecProcessRequest {
            container_id: "c1".into(),
            exec_id: id.into(),
            process: MessageField::some(process(&["sh", "-c", "id -u; id -g; id -G; echo $HOME"])),
            string_user: MessageField::some(user),
            ..Default::default()
        };
        agent.client.exec_process(context(), &request).await
    };
    exec("e1", user("me", "wheel", &["44"])).await.unwrap();
    assert_eq!(agent.stdout("c1", "e1").await, "1000\n10\n10 44\n/home/me\n");
    exec("e2", user("12", "", &[])).await.unwrap();
    assert_eq!(agent.stdout("c1", "e2").await, "12\n0\n0\n/\n");
    for bad in
        [user("nobody", "", &[]), user("", "nobody", &[]), user("", "", &["nobody"]), user("a\0", "", &[])]
    {
        let text = failed(exec("e3", bad.clone()).await, Kind::InvalidArgument);
        assert!(text.contains("is not in the container's /etc/"), "{text}");
        failed(create("c2", bad).await, Kind::InvalidArgument);
    }
    // What stands there may be anything.
    std::fs::remove_file(etc.join("passwd")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        etc.join("passwd"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o644),
        0,
    )
    .unwrap();
    std::fs::File::create(etc.join("group")).unwrap().set_len(1 << 30).unwrap();
    for user in [user("me", "", &[]), user("", "wheel", &[])] {
        let refused = tokio::time::timeout(QUICK, exec("e4", user.clone())).await.expect("it hangs");
        failed(refused, Kind::InvalidArgument);
        failed(
            tokio::time::timeout(QUICK, create("c2", user)).await.expect("it hangs"),
            Kind::InvalidArgument,
        );
    }
}

#[tokio::test]
async fn a_start_that_does_not_fit_is_refused_at_once() {
    let agent = agent_or_skip!();
    let refused = async |id: &str| {
        let start = tokio::time::timeout(QUICK, agent.start_container(id)).await.expect("it hangs");
        failed(start, Kind::FailedPrecondition)
    };
    agent.run("c1", &["sleep", "1000"]).await;
    refused("c1").await;
    assert_eq!(agent.shell("c1", "e", "echo unharmed").await.0, "unharmed\n");
    // One whose init has died before.
    agent.create("c2", agent.spec(&["true"])).await.unwrap();
    agent.signal("c2", "", 9).await.unwrap();
    assert_eq!(agent.wait("c2", "").await.unwrap(), 128 + 9);
    refused("c2").await;
    failed(agent.exec("c2", "e", process(&["true"])).await, Kind::FailedPrecondition);
    // And one that has run to its end.
    agent.run("c3", &["true"]).await;
    agent.wait("c3", "").await.unwrap();
    refused("c3").await;
    failed(agent.start_container("nobody").await, Kind::InvalidArgument);
    for id in ["c1", "c2", "c3"] {
        agent.remove(id).await.unwrap();
    }
}

#[tokio::test]
async fn unknown_ids_answer_alike_everywhere() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    for (id, kind) in [("nobody", Kind::InvalidArgument), ("c1", Kind::NotFound)] {
        failed(agent.write(id, "e", b"x").await, kind);
        failed(agent.write(id, "e", b"").await, kind);
        failed(agent.close(id, "e").await, kind);
        failed(agent.read(id, "e").await, kind);
        failed(agent.signal(id, "e", 15).await, kind);
        failed(agent.wait(id, "e").await, kind);
        let size = TtyWinResizeRequest {
            container_id: id.into(),
            exec_id: "e".into(),
            row: 1,
            column: 1,
            ..Default::default()
        };
        failed(agent.client.tty_win_resize(context(), &size).await, kind);
        let read =
            ReadStreamRequest { container_id: id.into(), exec_id: "e".into(), len: 1, ..Default::default() };
        failed(agent.client.read_stderr(context(), &read).await, kind);
    }
    let id = || "nobody".to_owned();
    let update = UpdateContainerRequest { container_id: id(), ..Default::default() };
    failed(agent.client.update_container(context(), &update).await, Kind::InvalidArgument);
    let stats = StatsContainerRequest { container_id: id(), ..Default::default() };
    failed(agent.client.stats_container(context(), &stats).await, Kind::InvalidArgument);
    let pause = PauseContainerRequest { container_id: id(), ..Default::default() };
    failed(agent.client.pause_container(context(), &pause).await, Kind::InvalidArgument);
    let resume = ResumeContainerRequest { container_id: id(), ..Default::default() };
    failed(agent.client.resume_container(context(), &resume).await, Kind::InvalidArgument);
    failed(agent.signal("nobody", "", 9).await, Kind::InvalidArgument);
    failed(agent.exec("nobody", "e", process(&["true"])).await, Kind::InvalidArgument);
    for signal in [0, 65, u32::MAX] {
        failed(agent.signal("c1", "", signal).await, Kind::InvalidArgument);
    }
}

#[tokio::test]
async fn codes_stay_readable_until_the_container_goes() {
    let agent = Arc::new(agent_or_skip!());
    agent.run("c1", &["sleep", "1000"]).await;
    for n in 0..60 {
        let (exec, line) = (format!("e{n}"), format!("exit {n}"));
        agent.exec("c1", &exec, process(&["sh", "-c", &line])).await.unwrap();
    }
    let waits: Vec<_> = (0..300)
        .map(|n| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move { agent.wait("c1", &format!("e{}", n % 60)).await.unwrap() })
        })
        .collect();
    for (n, wait) in waits.into_iter().enumerate() {
        assert_eq!(usize::try_from(wait.await.unwrap()).unwrap(), n % 60);
    }
    // Again, after all have ended, drained or not.
    for n in 0..60 {
        if n % 2 == 0 {
            agent.stdout("c1", &format!("e{n}")).await;
        }
        assert_eq!(agent.wait("c1", &format!("e{n}")).await.unwrap(), n);
        agent.signal("c1", &format!("e{n}"), 9).await.unwrap();
    }
    // Who waits when the container goes hears the code, and not that there is no container.
    agent.exec("c1", "last", process(&["sleep", "1000"])).await.unwrap();
    let waits: Vec<_> = ["", "c1", "last"]
        .map(|exec| {
            let agent = Arc::clone(&agent);
            tokio::spawn(async move { agent.wait("c1", exec).await.unwrap() })
        })
        .into();
    agent.shell("c1", "turn", "true").await;
    agent.remove("c1").await.unwrap();
    for wait in waits {
        assert_eq!(wait.await.unwrap(), 128 + 9);
    }
    failed(agent.wait("c1", "e1").await, Kind::InvalidArgument);
}

#[tokio::test]
async fn kill_all_ends_every_process_and_can_be_repeated() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"]).await;
    agent.exec("c1", "e1", process(&["sh", "-c", "trap '' TERM; sleep 1000 & sleep 1000"])).await.unwrap();
    for _ in 0..2 {
        agent.signal("c1", "", 9).await.unwrap();
        assert_eq!(agent.wait("c1", "").await.unwrap(), 128 + 9);
        assert_eq!(agent.wait("c1", "e1").await.unwrap(), 128 + 9);
    }
    agent.remove("c1").await.unwrap();
}

#[tokio::test]
async fn a_sandbox_that_shares_its_pids_does_so_with_every_container() {
    let agent = agent_or_skip!();
    let request =
        CreateSandboxRequest { sandbox_id: "pod".into(), sandbox_pidns: true, ..Default::default() };
    agent.client.create_sandbox(context(), &request).await.unwrap();
    failed(agent.client.create_sandbox(context(), &request).await, Kind::AlreadyExists);
    // The pause container has the sandbox's id.
    agent.run("pod", &["sleep", "1000"]).await;
    // None of them asks.
    agent.run("c1", &["sleep", "1000"]).await;
    agent.run("c2", &["sleep", "1000"]).await;
    let pids = async |id: &str| agent.shell(id, "pids", "readlink /proc/self/ns/pid").await.0;
    let all = pids("pod").await;
    assert_eq!(pids("c1").await, all);
    assert_eq!(pids("c2").await, all);
    // Its init is the first process of all, and takes them along.
    agent.signal("pod", "", 9).await.unwrap();
    for id in ["c1", "c2", "pod"] {
        assert_eq!(agent.wait(id, "").await.unwrap(), 128 + 9);
    }
    let text = failed(agent.create("c3", agent.spec(&["true"])).await, Kind::FailedPrecondition);
    assert!(text.contains("no pid namespace"), "{text}");
    for id in ["c1", "c2", "pod"] {
        agent.remove(id).await.unwrap();
    }
    // A new first one makes a new namespace.
    agent.run("pod", &["true"]).await;
    assert_eq!(agent.wait("pod", "").await.unwrap(), 0);
}

#[tokio::test]
async fn a_pid_namespace_is_joined_by_a_descriptor_and_only_while_its_first_process_runs() {
    let agent = agent_or_skip!();
    let member = async |id: &str| {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: MessageField::some(agent.spec(&["sleep", "1000"])),
            sandbox_pidns: true,
            ..Default::default()
        };
        agent.client.create_container(context(), &request).await?;
        agent.start_container(id).await
    };
    let pids = async |id: &str| agent.shell(id, "pids", "readlink /proc/self/ns/pid").await.0;
    let kept = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap();
        let links = files.filter_map(|file| std::fs::read_link(file.unwrap().path()).ok());
        let links = links.map(|link| link.to_str().unwrap_or_default().to_owned());
        links.filter(|link| link.starts_with("pid:")).collect::<Vec<_>>()
    };
    agent.run("pod", &["sleep", "1000"]).await;
    member("c1").await.unwrap();
    let of_pod = pids("pod").await;
    assert_eq!(pids("c1").await, of_pod);
    assert!(kept().contains(&of_pod.trim().to_owned()), "{:?}", kept());

    // It has ended and is reaped, and its pid may be another's.
    agent.signal("pod", "", 9).await.unwrap();
    for id in ["pod", "c1"] {
        assert_eq!(agent.wait(id, "").await.unwrap(), 128 + 9);
    }
    for _ in 0..2 {
        let text = failed(member("c2").await, Kind::FailedPrecondition);
        assert!(text.contains("no pid namespace") && text.contains("first container is gone"), "{text}");
    }
    // Who does not ask has one of its own.
    agent.run("c3", &["sleep", "1000"]).await;
    assert_ne!(pids("c3").await, of_pod);
    agent.remove("pod").await.unwrap();
    failed(member("c2").await, Kind::FailedPrecondition);
    for id in ["c1", "c3"] {
        agent.remove(id).await.unwrap();
    }
    assert!(kept().is_empty(), "{:?}", kept());
}

#[tokio::test]
async fn figures_of_the_network_are_the_guests() {
    let agent = agent_or_skip!();
    agent.run("c1", &["sleep", "1000"]).await;
    let request = StatsContainerRequest { container_id: "c1".into(), ..Default::default() };
    let stats = agent.client.stats_container(context(), &request).await.unwrap();
    let text = std::fs::read_to_string("/proc/net/dev").unwrap();
    let names: Vec<&str> = text.lines().filter_map(|line| Some(line.split_once(':')?.0.trim())).collect();
    let told: Vec<&str> = stats.network_stats.iter().map(|interface| interface.name.as_str()).collect();
    assert_eq!(told, names.into_iter().filter(|name| *name != "lo").collect::<Vec<_>>());
}

/// What containerd and its hosts say of every container: the labels of the host's kernel, a limit for each size of huge
/// page that the host has, and preferences that cgroup v2 has no file for.
#[tokio::test]
async fn what_belongs_to_the_hosts_kernel_stops_no_container() {
    let agent = agent_or_skip!();
    let selinux = std::path::Path::new("/sys/fs/selinux/enforce").exists();
    let label = |process: &mut oci::Process| {
        process.ApparmorProfile = "bulkhead-no-such-profile".into();
        process.SelinuxLabel =
            if selinux { String::new() } else { "system_u:system_r:container_t:s0".into() };
    };
    let mut spec = agent.spec(&["sleep", "1000"]);
    label(spec.Process.as_mut().unwrap());
    let linux = spec.Linux.as_mut().unwrap();
    if !selinux {
        linux.MountLabel = "system_u:object_r:container_file_t:s0".into();
    }
    let resources = linux.Resources.mut_or_insert_default();
    resources.CPU.mut_or_insert_default().Shares = 2;
    let limit = oci::LinuxHugepageLimit { Pagesize: "16GB".into(), ..Default::default() };
    resources.HugepageLimits.push(limit);
    let memory = resources.Memory.mut_or_insert_default();
    (memory.Swap, memory.Swappiness, memory.DisableOOMKiller) = (-1, 60, true);
    agent.create("c1", spec).await.unwrap();
    agent.start_container("c1").await.unwrap();
    let mut process = process(&["echo", "in"]);
    label(&mut process);
    agent.exec("c1", "e", process).await.unwrap();
    assert_eq!(agent.stdout("c1", "e").await, "in\n");
    agent.remove("c1").await.unwrap();
}
