//! Processors, memory and swap that the host plugs into a running guest.

use std::{fs, path::PathBuf, process::Command};

use anyhow::ensure;
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Disk, Hardware, context, failed, in_vm, plain},
    cases,
};
use bulkhead_protocol::{agent::*, status::Kind};

pub(super) const CASES: &[Case] = cases![
    plugged_processors_are_online_when_the_request_answers,
    plugged_memory_is_used,
    a_disk_becomes_swap,
    the_hosts_machine_is_left_alone,
];

fn hardware(seconds: u32) -> Hardware {
    Hardware { kernel_parameters: vec![format!("agent.hotplug_timeout={seconds}")], ..Hardware::default() }
}

async fn online(agent: &Agent, nb_cpus: u32, wait: bool) -> ttrpc::Result<()> {
    let request = OnlineCPUMemRequest { nb_cpus, wait, cpu_only: true, ..Default::default() };
    agent.client.online_cpu_mem(context(), &request).await.map(drop)
}

fn plugged_processors_are_online_when_the_request_answers(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware { max_cpus: 4, ..hardware(1) }, async |agent| {
        agent.pod().await?;
        let mut spec = agent.spec(&["sleep", "1000"]);
        let cpu =
            spec.Linux.mut_or_insert_default().Resources.mut_or_insert_default().CPU.mut_or_insert_default();
        cpu.Cpus = "0-1".into();
        agent.run_spec("c1", spec).await?;
        let count = async |exec: &str| agent.line("c1", exec, "grep -c ^processor /proc/cpuinfo").await;
        ensure!(count("before").await?.trim() == "1");

        let text = failed(online(agent, 2, false).await, Kind::DeadlineExceeded)?;
        ensure!(text.contains("2 processors") && text.contains("1 are, of 1"), "{text}");

        let plugging = async {
            agent.check().await?;
            agent.plug_cpu()
        };
        // One that waits, however short the usual wait is.
        let (onlined, plugged) = tokio::join!(online(agent, 2, true), plugging);
        plugged?;
        onlined?;
        ensure!(count("two").await?.trim() == "2");
        // As many as there are already.
        online(agent, 2, false).await?;
        online(agent, 0, true).await?;

        agent.plug_cpu()?;
        agent.plug_cpu()?;
        online(agent, 4, true).await?;
        ensure!(count("four").await?.trim() == "4");

        // The container's own set, of processors that were not there when it was made. The kernel adjusts it behind the
        // back of whoever plugged, hence the loop, which the call's deadline ends.
        let line = "until grep -q 'Cpus_allowed_list:.0-1$' /proc/self/status; do :; done";
        agent.line("c1", "cpuset", line).await?;
        Ok(())
    })
}

fn plugged_memory_is_used(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware { max_memory: 2048, ..hardware(3) }, async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let total = async |exec: &str| -> anyhow::Result<u64> {
            let line =
                agent.line("c1", exec, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo").await?;
            Ok(line.trim().parse()?)
        };
        let before = total("before").await?;
        agent.plug_memory(256)?;
        // Nobody asked the agent for anything: the kernel was told at boot.
        let more = before + (200 << 10);
        let line = format!(
            "until test $(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo) -gt {more}; do :; done"
        );
        agent.line("c1", "grown", &line).await?;
        agent.client.online_cpu_mem(context(), &OnlineCPUMemRequest::new()).await?;

        let request = MemHotplugByProbeRequest { memHotplugProbeAddr: vec![1 << 32], ..Default::default() };
        let probed = agent.client.mem_hotplug_by_probe(context(), &request).await;
        let text = failed(probed, Kind::FailedPrecondition)?;
        ensure!(text.contains("/sys/devices/system/memory/probe"), "{text}");
        Ok(())
    })
}

/// A disk that the host has formatted.
fn swap_disk(scratch: &Scratch, name: &str) -> anyhow::Result<PathBuf> {
    let file = scratch.path().join(name);
    fs::write(&file, vec![0; 8 << 20])?;
    let made = Command::new("mkswap").arg(&file).output()?;
    ensure!(made.status.success(), "mkswap: {}", String::from_utf8_lossy(&made.stderr));
    Ok(file)
}

fn a_disk_becomes_swap(scratch: &Scratch) -> anyhow::Result<()> {
    let disks = vec![
        Disk::new(swap_disk(scratch, "swap1")?).bridged(),
        Disk::new(swap_disk(scratch, "swap2")?),
        Disk::new(swap_disk(scratch, "blank")?),
    ];
    fs::write(scratch.path().join("blank"), vec![0; 8 << 20])?;
    in_vm(scratch, Hardware { disks, ..hardware(1) }, async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let add = async |slots: &[u32]| {
            let request = AddSwapRequest { PCIPath: slots.to_vec(), ..Default::default() };
            agent.client.add_swap(context(), &request).await
        };
        let add_path = async |path: &str| {
            let request = AddSwapPathRequest { path: path.into(), ..Default::default() };
            agent.client.add_swap_path(context(), &request).await
        };
        add(&[2, 1]).await?;
        let swaps = agent.line("c1", "one", "cat /proc/swaps").await?;
        ensure!(swaps.matches("/dev/vd").count() == 1, "{swaps}");
        // Slot 8 and the path of what it is.
        add(&[8]).await?;
        let swaps = agent.line("c1", "two", "cat /proc/swaps").await?;
        ensure!(swaps.matches("/dev/vd").count() == 2, "{swaps}");
        let first = swaps.lines().nth(1).and_then(|line| line.split_whitespace().next()).unwrap_or_default();
        let text = failed(add_path(first).await, Kind::Internal)?;
        ensure!(text.contains(first) && text.contains("busy"), "{text}");
        let text = failed(add(&[9]).await, Kind::Internal)?;
        ensure!(text.contains("swap to /dev/vd") && text.contains("Invalid argument"), "{text}");
        let text = failed(add(&[2, 30]).await, Kind::DeadlineExceeded)?;
        ensure!(text.contains("02.0/1e.0"), "{text}");
        for slots in [&[][..], &[32], &[2, u32::MAX]] {
            failed(add(slots).await, Kind::InvalidArgument)?;
        }
        for path in ["", "vda", "/dev/\0"] {
            failed(add_path(path).await, Kind::InvalidArgument)?;
        }
        let text = failed(add_path("/dev/none").await, Kind::Internal)?;
        ensure!(text.contains("/dev/none"), "{text}");
        Ok(())
    })
}

fn the_hosts_machine_is_left_alone(scratch: &Scratch) -> anyhow::Result<()> {
    plain(scratch, async |agent| {
        failed(online(agent, 1, false).await, Kind::FailedPrecondition)?;
        let probe = MemHotplugByProbeRequest { memHotplugProbeAddr: vec![0], ..Default::default() };
        failed(agent.client.mem_hotplug_by_probe(context(), &probe).await, Kind::FailedPrecondition)?;
        let swap = AddSwapRequest { PCIPath: vec![2], ..Default::default() };
        failed(agent.client.add_swap(context(), &swap).await, Kind::FailedPrecondition)?;
        let swap = AddSwapPathRequest { path: "/dev/vda".into(), ..Default::default() };
        failed(agent.client.add_swap_path(context(), &swap).await, Kind::FailedPrecondition)?;
        let set = agent.client.mem_agent_memcg_set(context(), &MemAgentMemcgConfig::new()).await;
        let text = failed(set, Kind::Unimplemented)?;
        ensure!(text.contains("free page reporting"), "{text}");
        let set = agent.client.mem_agent_compact_set(context(), &MemAgentCompactConfig::new()).await;
        failed(set, Kind::Unimplemented)?;
        Ok(())
    })
}
