//! Containers in a VM: limits and figures, freezing, lack of memory, and what containers of a pod share.

use std::time::Duration;

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, context, failed, grant, in_vm, mount, process},
    cases,
};
use bulkhead_protocol::{agent::*, oci, protobuf::MessageField, status::Kind};
use ttrpc::context::Context as Deadline;

pub(super) const CASES: &[Case] = cases![
    limits_are_set_updated_and_counted,
    a_paused_container_answers_and_goes,
    lack_of_memory_is_told_of_containers_and_not_of_the_pod,
    a_pod_shares_pids_ipc_and_name,
    mounts_and_users_of_containers,
    the_guests_hooks_run_in_the_guest,
];

/// A container that sees its own cgroup.
fn spec(agent: &Agent, command: &[&str]) -> oci::Spec {
    let mut spec = agent.spec(command);
    spec.Mounts.push(mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]));
    spec
}

fn resources(spec: &mut oci::Spec) -> &mut oci::LinuxResources {
    spec.Linux.mut_or_insert_default().Resources.mut_or_insert_default()
}

async fn update(agent: &Agent, id: &str, resources: oci::LinuxResources) -> ttrpc::Result<()> {
    let request = UpdateContainerRequest {
        container_id: id.into(),
        resources: MessageField::some(resources),
        ..Default::default()
    };
    agent.client.update_container(context(), &request).await.map(drop)
}

/// Compares files of a container's cgroup.
async fn expect(agent: &Agent, exec: &str, wanted: &[(&str, &str)]) -> anyhow::Result<()> {
    let files: Vec<&str> = wanted.iter().map(|(file, _)| *file).collect();
    let text =
        agent.line("c1", exec, &format!("cd /sys/fs/cgroup; tail -n 1 -q {}", files.join(" "))).await?;
    let values: Vec<&str> = wanted.iter().map(|(_, value)| *value).collect();
    ensure!(text.lines().eq(values.iter().copied()), "{files:?}: {text:?}, not {values:?}");
    Ok(())
}

fn limits_are_set_updated_and_counted(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let mut limited = spec(agent, &["sleep", "1000"]);
        let wanted = resources(&mut limited);
        let cpu = wanted.CPU.mut_or_insert_default();
        (cpu.Shares, cpu.Quota, cpu.Period) = (1, 20_000, 100_000);
        let memory = wanted.Memory.mut_or_insert_default();
        (memory.Limit, memory.Swap, memory.Reservation) = (64 << 20, 96 << 20, 16 << 20);
        wanted.Pids.mut_or_insert_default().Limit = 20;
        // What a host says of its own kernel: sizes of huge pages, an AppArmor profile, preferences of version 1.
        memory.Swappiness = 60;
        for size in ["64KB", "2MB", "1GB", "16GB"] {
            wanted
                .HugepageLimits
                .push(oci::LinuxHugepageLimit { Pagesize: size.into(), ..Default::default() });
        }
        limited.Process.mut_or_insert_default().ApparmorProfile = "cri-containerd.apparmor.d".into();
        agent.run_spec("c1", limited).await?;
        let set = [
            ("cpu.weight", "1"),
            ("cpu.max", "20000 100000"),
            ("memory.max", "67108864"),
            ("memory.low", "16777216"),
            ("pids.max", "20"),
        ];
        expect(agent, "set", &set).await?;

        // Work at a fifth of a processor, and a file of 8 MiB in memory.
        agent
            .line(
                "c1",
                "busy",
                "dd if=/dev/zero of=/dev/file bs=1M count=8; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done",
            )
            .await?;
        let used = async |exec: &str| {
            let text = agent.line("c1", exec, "grep usage_usec /sys/fs/cgroup/cpu.stat").await?;
            Ok::<u64, anyhow::Error>(text.trim().trim_start_matches("usage_usec ").parse()?)
        };
        let before = used("before").await?;
        let stats = agent.stats("c1").await?;
        let after = used("after").await?;
        let figures = &stats.cgroup_stats;
        ensure!(
            (figures.pids_stats.current, figures.pids_stats.limit) == (1, 20),
            "{:?}",
            figures.pids_stats
        );
        let memory = &figures.memory_stats;
        ensure!(memory.usage.limit == 64 << 20, "{:?}", memory.usage);
        ensure!(memory.usage.usage >= 8 << 20 && memory.stats["shmem"] >= 8 << 20, "{memory:?}");
        let (usage, throttling) = (&figures.cpu_stats.cpu_usage, &figures.cpu_stats.throttling_data);
        let told = usage.total_usage / 1000;
        ensure!((before..=after).contains(&told) && before > 50_000, "{before} {told} {after}");
        ensure!(throttling.throttled_periods > 0 && throttling.throttled_time > 0, "{throttling:?}");

        // 0 leaves a limit as it is, -1 takes it away, and absent sections are left alone.
        let mut change = oci::LinuxResources::new();
        change.CPU.mut_or_insert_default().Quota = -1;
        change.Memory.mut_or_insert_default().Limit = 128 << 20;
        update(agent, "c1", change).await?;
        let set = [
            ("cpu.weight", "1"),
            ("cpu.max", "max 100000"),
            ("memory.max", "134217728"),
            ("memory.low", "16777216"),
            ("pids.max", "20"),
        ];
        expect(agent, "changed", &set).await?;
        let mut change = oci::LinuxResources::new();
        change.Memory.mut_or_insert_default().Limit = -1;
        change.Memory.mut_or_insert_default().Reservation = -1;
        change.Pids.mut_or_insert_default().Limit = -1;
        update(agent, "c1", change).await?;
        expect(agent, "unlimited", &[("memory.max", "max"), ("memory.low", "max"), ("pids.max", "max")])
            .await?;
        agent
            .client
            .update_container(
                context(),
                &UpdateContainerRequest { container_id: "c1".into(), ..Default::default() },
            )
            .await?;
        let mut bad = oci::LinuxResources::new();
        bad.CPU.mut_or_insert_default().Cpus = "77".into();
        failed(update(agent, "c1", bad).await, Kind::Internal)?;
        agent.remove("c1").await?;
        Ok(())
    })
}

fn a_paused_container_answers_and_goes(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        agent.run("c2", &["sleep", "1000"]).await?;
        let pause = PauseContainerRequest { container_id: "c1".into(), ..Default::default() };
        let resume = ResumeContainerRequest { container_id: "c1".into(), ..Default::default() };
        agent.client.pause_container(context(), &pause).await?;
        failed(agent.client.pause_container(context(), &pause).await, Kind::FailedPrecondition)?;
        // Nothing of this waits for the frozen processes.
        let quick = async {
            failed(agent.exec("c1", "e", process(&["true"])).await, Kind::FailedPrecondition)?;
            ensure!(agent.stats("c1").await?.cgroup_stats.pids_stats.current == 1);
            let (output, _) = agent.shell("c2", "e", "echo lively").await?;
            ensure!(output == "lively\n", "{output}");
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(30), quick).await.context("it hangs")??;
        agent.client.resume_container(context(), &resume).await?;
        failed(agent.client.resume_container(context(), &resume).await, Kind::FailedPrecondition)?;
        ensure!(agent.line("c1", "e", "echo back").await? == "back\n");
        // Killed as it is, and removed as it is.
        agent.client.pause_container(context(), &pause).await?;
        agent.signal("c1", "", 9).await?;
        ensure!(agent.wait("c1", "").await? == 128 + 9);
        agent.remove("c1").await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        agent.client.pause_container(context(), &pause).await?;
        agent.remove("c1").await?;
        // A container can be paused before it is started.
        agent.create("c1", agent.spec(&["true"])).await?;
        agent.client.pause_container(context(), &pause).await?;
        failed(agent.start_container("c1").await, Kind::FailedPrecondition)?;
        agent.client.resume_container(context(), &resume).await?;
        agent.start_container("c1").await?;
        ensure!(agent.wait("c1", "").await? == 0);
        Ok(())
    })
}

fn lack_of_memory_is_told_of_containers_and_not_of_the_pod(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let hog = "dd if=/dev/zero of=/dev/null bs=40M count=1";
        for id in ["pod", "c1"] {
            let mut small = agent.spec(&["sleep", "1000"]);
            resources(&mut small).Memory.mut_or_insert_default().Limit = 16 << 20;
            agent.run_spec(id, small).await?;
        }
        ensure!(agent.shell("pod", "hog", hog).await?.1 == 128 + 9);
        let next = GetOOMEventRequest::new();
        // Each event is told, and once.
        for exec in ["first", "second"] {
            ensure!(agent.shell("c1", exec, hog).await?.1 == 128 + 9);
            let event = agent.client.get_oom_event(Deadline::default(), &next);
            let event = tokio::time::timeout(Duration::from_secs(30), event).await.context("no event")??;
            ensure!(event.container_id == "c1", "{event:?}");
        }
        let quiet = agent.client.get_oom_event(Deadline::default(), &next);
        ensure!(tokio::time::timeout(Duration::from_millis(500), quiet).await.is_err(), "an event too many");
        agent.check().await?;
        Ok(())
    })
}

fn a_pod_shares_pids_ipc_and_name(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        let request = CreateSandboxRequest { sandbox_pidns: true, ..agent.pod_request() };
        agent.client.create_sandbox(context(), &request).await?;
        failed(agent.client.create_sandbox(context(), &request).await, Kind::AlreadyExists)?;
        agent.run("pod", &["sleep", "1000"]).await?;
        let mut member = agent.spec(&["sleep", "1000"]);
        member.Hostname = "another".into();
        agent.run_spec("c1", member).await?;
        let seen = "hostname; for kind in pid ipc uts; do readlink /proc/self/ns/$kind; done";
        let of_pod = agent.line("pod", "e", seen).await?;
        ensure!(of_pod.starts_with("pod\n"), "{of_pod}");
        ensure!(agent.line("c1", "e", seen).await? == of_pod);
        ensure!(agent.line("c1", "ps", "tr '\\0' ' ' < /proc/1/cmdline").await? == "sleep 1000 ");
        ensure!(
            agent.line("pod", "mount", "readlink /proc/self/ns/mnt").await?
                != agent.line("c1", "mount", "readlink /proc/self/ns/mnt").await?
        );
        // Everything of a member goes, though the namespace stays.
        agent.exec("c1", "left", process(&["sh", "-c", "sleep 1000 & sleep 1000"])).await?;
        agent.remove("c1").await?;
        let left = agent.line("pod", "left", "cat /proc/[0-9]*/comm | grep -c sleep").await?;
        ensure!(left == "1\n", "{left}");
        Ok(())
    })
}

fn mounts_and_users_of_containers(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let named = |name: &str, command: &str| {
            let mut spec = agent.spec(&["sh", "-c", command]);
            spec.Annotations.insert("io.kubernetes.cri.container-name".into(), name.into());
            spec
        };
        let mut maker = named(
            "maker",
            "read go; mkdir -p /dev/m; mount -t tmpfs m /dev/m; echo in > /dev/m/file; sleep 1000",
        );
        grant(maker.Process.as_mut().context("a process")?, &["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"]);
        agent.run_spec("source", maker).await?;
        let request = CreateContainerRequest {
            container_id: "target".into(),
            OCI: MessageField::some(named("taker", "cat /dev/taken/file")),
            shared_mounts: vec![SharedMount {
                src_ctr: "maker".into(),
                src_path: "/dev/m".into(),
                dst_ctr: "taker".into(),
                dst_path: "/dev/taken".into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let make = async {
            // The mount is made while the other container waits for it.
            ensure!(agent.line("source", "e", "echo in").await? == "in\n");
            agent.write("source", "", b"go\n").await?;
            anyhow::Ok(())
        };
        let (created, made) = tokio::join!(agent.client.create_container(context(), &request), make);
        made?;
        created?;
        agent.start_container("target").await?;
        ensure!(agent.stdout("target", "").await? == "in\n");

        agent.put("rootfs/etc/passwd", b"me:x:1000:100::/home/me:/bin/sh\n", 0o644)?;
        agent.put("rootfs/etc/group", b"video:x:44:\n", 0o644)?;
        let request = ExecProcessRequest {
            container_id: "source".into(),
            exec_id: "me".into(),
            process: MessageField::some(process(&["sh", "-c", "id -u; id -g; id -G"])),
            string_user: MessageField::some(StringUser {
                uid: "me".into(),
                additionalGids: vec!["video".into()],
                ..Default::default()
            }),
            ..Default::default()
        };
        agent.client.exec_process(context(), &request).await?;
        ensure!(agent.stdout("source", "me").await? == "1000\n100\n100 44\n");
        Ok(())
    })
}

fn the_guests_hooks_run_in_the_guest(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        let log = format!("{}/log", agent.share());
        let hook = |what: &str| {
            let busybox = format!("{}/bin/busybox", agent.rootfs());
            format!(
                "#!{busybox} sh\nb={busybox}\necho {what} $1 $($b readlink /proc/self/ns/mnt) $($b readlink /proc/1/ns/mnt) >> {log}\n"
            )
        };
        for (file, what) in
            [("prestart/2", "two"), ("prestart/1", "one"), ("poststart/1", "three"), ("poststop/1", "four")]
        {
            agent.put(&format!("hooks/{file}"), hook(what).as_bytes(), 0o755)?;
        }
        agent.put("hooks/prestart/0-not-executable", b"x", 0o644)?;
        let relative = CreateSandboxRequest { guest_hook_path: "hooks".into(), ..agent.pod_request() };
        failed(agent.client.create_sandbox(context(), &relative).await, Kind::InvalidArgument)?;
        let guest_hook_path = format!("{}/hooks", agent.share());
        let request = CreateSandboxRequest { guest_hook_path, ..agent.pod_request() };
        agent.client.create_sandbox(context(), &request).await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        agent.remove("c1").await?;
        let told = std::fs::read_to_string(agent.host_share().join("log"))?;
        let lines: Vec<Vec<&str>> = told.lines().map(|line| line.split(' ').collect()).collect();
        let names: Vec<String> = lines.iter().map(|words| words[..2].join(" ")).collect();
        ensure!(names == ["one prestart", "two prestart", "three poststart", "four poststop"], "{told}");
        ensure!(lines.iter().all(|words| words.len() == 4 && words[2] == words[3]), "{told}");
        Ok(())
    })
}
