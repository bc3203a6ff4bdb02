//! The requests for containers, processes, the sandbox and the machine, in a guest of their own.

use std::time::Duration;

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, context, failed, in_vm, mount, process},
    cases,
};
use bulkhead_protocol::{
    agent::*,
    health::CheckRequest,
    oci::{LinuxCPU, LinuxMemory, LinuxPids, LinuxResources},
    ports,
    protobuf::MessageField,
    status::Kind,
};
use futures_util::future::try_join_all;

pub(super) const CASES: &[Case] = cases![
    a_guest_tells_its_health_version_details_and_figures,
    a_guest_takes_randomness_and_the_time,
    a_container_is_made_counted_limited_paused_and_removed,
    processes_have_streams_terminals_signals_and_exits,
    a_pod_shares_names_and_processes_and_ends_with_its_machine,
    the_first_process_reaps_what_is_orphaned,
    calls_on_other_containers_do_not_wait_for_a_slow_one,
];

fn a_guest_tells_its_health_version_details_and_figures(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.check().await?;
        let version = agent.health.version(context(), &CheckRequest::new()).await?;
        ensure!(version.grpc_version == "0.0.1" && !version.agent_version.is_empty(), "{version}");
        let request =
            GuestDetailsRequest { mem_block_size: true, mem_hotplug_probe: true, ..Default::default() };
        let guest = agent.client.get_guest_details(context(), &request).await?;
        let details = guest.agent_details.as_ref().context("no details of the agent")?;
        ensure!(details.init_daemon && details.supports_seccomp, "{details}");
        ensure!(
            details.storage_handlers.is_sorted()
                && details.storage_handlers.iter().any(|name| name == "virtio-fs")
        );
        ensure!(guest.mem_block_size_bytes == 128 << 20, "{guest}");
        let metrics = agent.client.get_metrics(context(), &GetMetricsRequest::new()).await?.metrics;
        for stage in ["started", "listening"] {
            let name = format!("bulkhead_agent_boot_seconds{{stage=\"{stage}\"}} ");
            let value =
                metrics.lines().find_map(|line| line.strip_prefix(&name)).context("a stage is missing")?;
            ensure!((0.01..90.0).contains(&value.parse::<f64>()?), "{metrics}");
        }
        Ok(())
    })
}

fn a_guest_takes_randomness_and_the_time(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let reseed = |data: Vec<u8>| ReseedRandomDevRequest { data, ..Default::default() };
        agent.client.reseed_random_dev(context(), &reseed(vec![7; 512])).await?;
        failed(agent.client.reseed_random_dev(context(), &reseed(Vec::new())).await, Kind::InvalidArgument)?;
        let time =
            |seconds, micros| SetGuestDateTimeRequest { Sec: seconds, Usec: micros, ..Default::default() };
        agent.client.set_guest_date_time(context(), &time(1_000_000_000, 999_999)).await?;
        let told: i64 = agent.line("c1", "date", "date +%s").await?.trim().parse()?;
        ensure!((1_000_000_000..1_000_000_600).contains(&told), "{told}");
        for (seconds, micros) in [(1, -1), (1, 1_000_000)] {
            let refused = agent.client.set_guest_date_time(context(), &time(seconds, micros)).await;
            failed(refused, Kind::InvalidArgument)?;
        }
        Ok(())
    })
}

/// The content of a file of a container's cgroup.
async fn cgroup(agent: &Agent, id: &str, file: &str) -> anyhow::Result<String> {
    static LOOKS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let look = format!("look{}", LOOKS.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    Ok(agent.line("eye", &look, &format!("cat /guest/cgroup/{id}/{file}")).await?.trim().to_owned())
}

fn a_container_is_made_counted_limited_paused_and_removed(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.eye().await?;
        let limits = |memory, shares, quota, pids| LinuxResources {
            Memory: MessageField::some(LinuxMemory { Limit: memory, ..Default::default() }),
            CPU: MessageField::some(LinuxCPU {
                Shares: shares,
                Quota: quota,
                Period: 100_000,
                ..Default::default()
            }),
            Pids: MessageField::some(LinuxPids { Limit: pids, ..Default::default() }),
            ..Default::default()
        };
        let script =
            "head -c 8000000 /dev/zero > /big; n=0; echo up; while :; do n=$((n+1)); echo $n > /count; done";
        let mut spec = agent.spec(&["sh", "-c", script]);
        spec.Linux.mut_or_insert_default().Resources = MessageField::some(limits(64 << 20, 512, 50_000, 100));
        spec.Mounts.push(mount("/big-files", "tmpfs", "tmpfs", &[]));
        agent.create("c1", spec).await?;
        ensure!(cgroup(agent, "c1", "memory.max").await? == (64 << 20).to_string());
        agent.start_container("c1").await?;
        ensure!(agent.read("c1", "").await? == b"up\n");
        ensure!(cgroup(agent, "c1", "cpu.max").await? == "50000 100000");

        // The figures are the kernel's.
        agent.line("eye", "fork", "true").await?;
        let stats = agent.stats("c1").await?.cgroup_stats.unwrap_or_default();
        ensure!(stats.memory_stats.usage.limit == 64 << 20, "{stats}");
        ensure!(stats.memory_stats.usage.usage > 0 && stats.cpu_stats.cpu_usage.total_usage > 0, "{stats}");
        ensure!(stats.pids_stats.limit == 100 && stats.pids_stats.current == 1, "{stats}");

        let update = |resources| UpdateContainerRequest {
            container_id: "c1".into(),
            resources: MessageField::some(resources),
            ..Default::default()
        };
        agent.client.update_container(context(), &update(limits(96 << 20, 1024, 80_000, 50))).await?;
        ensure!(cgroup(agent, "c1", "memory.max").await? == (96 << 20).to_string());
        ensure!(cgroup(agent, "c1", "cpu.max").await? == "80000 100000");
        // -1 is no limit, 0 is no change.
        agent.client.update_container(context(), &update(limits(-1, 0, -1, 0))).await?;
        ensure!(cgroup(agent, "c1", "memory.max").await? == "max");
        ensure!(cgroup(agent, "c1", "cpu.max").await?.starts_with("max "));

        let pause = PauseContainerRequest { container_id: "c1".into(), ..Default::default() };
        agent.client.pause_container(context(), &pause).await?;
        let counted = async || -> anyhow::Result<u64> {
            Ok(cgroup(agent, "c1", "cpu.stat").await?.split_whitespace().nth(1).context("usage")?.parse()?)
        };
        let frozen = counted().await?;
        agent.line("eye", "pass", "sleep 0.3").await?;
        ensure!(counted().await? == frozen, "a paused container runs");
        let resume = ResumeContainerRequest { container_id: "c1".into(), ..Default::default() };
        agent.client.resume_container(context(), &resume).await?;
        agent.line("eye", "pass2", "sleep 0.3").await?;
        ensure!(counted().await? > frozen, "a resumed container does not run");

        let remove = RemoveContainerRequest { container_id: "c1".into(), timeout: 30, ..Default::default() };
        agent.client.remove_container(context(), &remove).await?;
        agent.client.remove_container(context(), &remove).await?;
        agent.line("eye", "gone", "! test -e /guest/cgroup/c1").await?;
        let mounts = agent.line("eye", "mounts", "cat /guest/proc/1/mountinfo").await?;
        ensure!(!mounts.contains("c1"), "{mounts}");
        Ok(())
    })
}

fn processes_have_streams_terminals_signals_and_exits(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent
            .create("c1", agent.spec(&["sh", "-c", "echo out; echo err >&2; read x; echo got $x; exit 42"]))
            .await?;
        let waits = (0..4).map(|n| agent.wait("c1", if n % 2 == 0 { "" } else { "c1" }));
        let all = try_join_all(waits);
        let life = async {
            agent.start_container("c1").await?;
            ensure!(agent.stderr("c1", "").await? == "err\n" || agent.read("c1", "").await? == b"out\n");
            anyhow::Ok(())
        };
        let input = async {
            agent.check().await?;
            while agent.write("c1", "", b"in\n").await.is_err() {
                agent.check().await?;
            }
            agent.close("c1", "").await?;
            anyhow::Ok(())
        };
        let (all, life, input) = tokio::join!(all, life, input);
        life?;
        input?;
        ensure!(all?.iter().all(|code| *code == 42));
        ensure!(agent.stdout("c1", "").await?.ends_with("got in\n"));
        ensure!(agent.wait("c1", "").await? == 42, "the code is forgotten");

        agent.run("c2", &["sleep", "1000"]).await?;
        let mut shell = process(&["sh", "-c", "stty size; read line; stty size; echo got $line; exit 5"]);
        shell.Terminal = true;
        agent.exec("c2", "tty", shell).await?;
        agent.read("c2", "tty").await?;
        let size = TtyWinResizeRequest {
            container_id: "c2".into(),
            exec_id: "tty".into(),
            row: 44,
            column: 111,
            ..Default::default()
        };
        agent.client.tty_win_resize(context(), &size).await?;
        agent.write("c2", "tty", b"hello\n").await?;
        let output = agent.stdout("c2", "tty").await?;
        ensure!(output.contains("44 111\r\n") && output.contains("got hello\r\n"), "{output:?}");
        ensure!(agent.wait("c2", "tty").await? == 5 && agent.read("c2", "tty").await?.is_empty());

        // A duplicate id harms nothing.
        agent.exec("c2", "twin", process(&["cat"])).await?;
        failed(agent.exec("c2", "twin", process(&["true"])).await, Kind::AlreadyExists)?;
        agent.write("c2", "twin", b"alive").await?;
        agent.close("c2", "twin").await?;
        ensure!(agent.stdout("c2", "twin").await? == "alive");
        for id in ["nobody", "c3"] {
            failed(agent.wait("c2", id).await, Kind::NotFound)?;
            failed(agent.wait(id, "").await, Kind::InvalidArgument)?;
        }
        Ok(())
    })
}

fn a_pod_shares_names_and_processes_and_ends_with_its_machine(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        let mut request = agent.pod_request();
        request.hostname = "a-pod".into();
        request.sandbox_id = "pause".into();
        request.dns = vec!["nameserver 192.0.2.1".into()];
        agent.client.create_sandbox(context(), &request).await?;
        failed(agent.client.create_sandbox(context(), &request).await, Kind::AlreadyExists)?;
        agent.run("pause", &["sleep", "1000"]).await?;
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Mounts.push(mount("/dev/shm", "bind", ports::GUEST_SHM, &["rbind"]));
        spec.Mounts.push(mount("/etc/resolv.conf", "bind", "/etc/resolv.conf", &["bind", "ro"]));
        let member = CreateContainerRequest {
            container_id: "member".into(),
            OCI: MessageField::some(spec),
            sandbox_pidns: true,
            ..Default::default()
        };
        agent.client.create_container(context(), &member).await?;
        agent.start_container("member").await?;
        let look = "hostname; for ns in ipc net pid uts; do readlink /proc/self/ns/$ns; done";
        let (pause, member) = (agent.line("pause", "e", look).await?, agent.line("member", "e", look).await?);
        ensure!(pause == member && pause.starts_with("a-pod\nipc:["), "{pause}{member}");
        let resolver = agent.line("member", "dns", "cat /etc/resolv.conf").await?;
        ensure!(resolver.contains("192.0.2.1"), "{resolver}");
        let shm = agent.line("member", "shm", "df -k /dev/shm").await?;
        ensure!(shm.contains("65536"), "{shm}");
        ensure!(agent.line("member", "ps", "ps -o args").await?.matches("sleep 1000").count() == 2);

        agent.client.destroy_sandbox(context(), &DestroySandboxRequest::new()).await?;
        agent.ended().await
    })
}

fn the_first_process_reaps_what_is_orphaned(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.eye().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        // Children of execs that are gone, in and out of the container's pid namespace, and of a container that ends.
        for n in 0..10 {
            agent.line("c1", &format!("e{n}"), "(sh -c 'sleep 0.01; exit 3' &) ; (sleep 0.02 &)").await?;
        }
        agent.run("c2", &["sh", "-c", "(sleep 1000 &); (sleep 1000 &); exit 0"]).await?;
        ensure!(agent.wait("c2", "").await? == 0);
        agent.remove("c1").await?;
        agent.remove("c2").await?;
        let dead = "grep -l 'State:.Z' /guest/proc/[0-9]*/status 2>/dev/null | wc -l";
        let none = async {
            for n in 0.. {
                if agent.line("eye", &format!("z{n}"), dead).await?.trim() == "0" {
                    break;
                }
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(Duration::from_secs(20), none).await.context("zombies stay")?
    })
}

/// Calls that wait do so alone: not even those on the same process are held up.
fn calls_on_other_containers_do_not_wait_for_a_slow_one(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("busy", &["sleep", "1000"]).await?;
        // A write that nobody reads and a read that nobody feeds, on the same container and process.
        agent.exec("busy", "deaf", process(&["sleep", "1000"])).await?;
        let work = async {
            for n in 0..5 {
                agent.line("busy", &format!("e{n}"), "echo fine").await?;
                let id = format!("c{n}");
                agent.run(&id, &["true"]).await?;
                ensure!(agent.wait(&id, "").await? == 0);
                agent.remove(&id).await?;
            }
            agent.signal("busy", "deaf", 9).await?;
            anyhow::Ok(())
        };
        let megabyte = vec![0; 1 << 20];
        let (written, read, work) =
            tokio::join!(agent.write("busy", "deaf", &megabyte), agent.read("busy", "deaf"), work);
        work?;
        failed(written, Kind::FailedPrecondition)?;
        ensure!(read?.is_empty());
        Ok(())
    })
}
