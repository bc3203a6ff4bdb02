//! Faults inside a guest: a container that is frozen, full, out of memory, out of processes; limits that are not there; a
//! clock that jumps. The agent answers, and so do the other containers.

use std::time::Duration;

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, context, failed, in_vm, mount, process},
    cases,
};
use bulkhead_protocol::{
    agent::*,
    oci::{LinuxMemory, LinuxPids, LinuxResources, Spec},
    protobuf::MessageField,
    status::Kind,
};
use tokio::time::timeout;

pub(super) const CASES: &[Case] = cases![
    lock_held_stats_and_kill_answer_for_a_frozen_container,
    enospc_in_guest_leaves_the_agent_and_its_execs_alive,
    fork_bomb_with_a_limit_hurts_nobody_else,
    fork_bomb_without_a_limit_leaves_the_agent_answering,
    fork_bomb_that_takes_every_thread_of_the_guest_does_not_end_it,
    oom_in_a_container_kills_it_and_nobody_else,
    oom_of_the_guest_never_takes_the_agent,
    cgroup_surprises_a_leftover_of_the_same_name_is_made_anew,
    cgroup_surprises_a_kernel_without_a_controller_says_so,
    clock_jump_fires_no_timer,
    signal_scope_and_exit_codes,
];

/// What answers at all answers within this, on a slow machine under load.
const PROMPT: Duration = Duration::from_secs(10);

fn limited(agent: &Agent, command: &[&str], resources: LinuxResources) -> Spec {
    let mut spec = agent.spec(command);
    spec.Linux.mut_or_insert_default().Resources = MessageField::some(resources);
    spec
}

fn memory(bytes: i64) -> LinuxResources {
    LinuxResources {
        Memory: MessageField::some(LinuxMemory { Limit: bytes, ..Default::default() }),
        ..Default::default()
    }
}

fn pids(limit: i64) -> LinuxResources {
    LinuxResources {
        Pids: MessageField::some(LinuxPids { Limit: limit, ..Default::default() }),
        ..Default::default()
    }
}

fn lock_held_stats_and_kill_answer_for_a_frozen_container(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sh", "-c", "while :; do :; done"]).await?;
        agent.run("other", &["sleep", "1000"]).await?;
        let pause = PauseContainerRequest { container_id: "c1".into(), ..Default::default() };
        agent.client.pause_container(context(), &pause).await?;
        let all = async {
            let stats = futures_util::future::join_all((0..16).map(|_| agent.stats("c1")));
            let exec = agent.line("other", "e1", "echo here");
            let (stats, killed, exec) = tokio::join!(stats, agent.signal("c1", "", 9), exec);
            stats.into_iter().try_for_each(|stats| stats.map(drop))?;
            killed?;
            exec?;
            ensure!(agent.wait("c1", "").await? == 137);
            agent.remove("c1").await?;
            anyhow::Ok(())
        };
        timeout(PROMPT, all).await.context("a frozen container holds something up")?
    })
}

fn enospc_in_guest_leaves_the_agent_and_its_execs_alive(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        // A tmpfs of the container, and the guest's own /run.
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Mounts.push(mount("/small", "tmpfs", "tmpfs", &["size=1m"]));
        spec.Mounts.push(mount("/guest-run", "bind", "/run", &["bind"]));
        agent.run_spec("c1", spec).await?;
        let (output, code) = agent.shell("c1", "fill", "dd if=/dev/zero of=/small/full bs=64k").await?;
        ensure!(code == 1 && output.contains("No space left"), "{output}");
        agent.line("c1", "rm", "rm /small/full; dd if=/dev/zero of=/small/again bs=64k count=4").await?;
        let (output, code) = agent.shell("c1", "run", "dd if=/dev/zero of=/guest-run/full bs=1M").await?;
        ensure!(code == 1 && output.contains("No space left"), "{output}");
        agent.check().await?;
        agent.line("c1", "meanwhile", "echo fine").await?;
        // It may be refused, in clear words, but not left half done.
        if let Err(error) = agent.run("c2", &["true"]).await {
            ensure!(error.to_string().contains("No space left"), "{error}");
        }
        agent.line("c1", "free", "rm /guest-run/full").await?;
        agent.run("c3", &["true"]).await?;
        ensure!(agent.wait("c3", "").await? == 0);
        Ok(())
    })
}

/// Init only sleeps, because a shell that cannot fork ends.
const BOMB: &str = "bomb() { bomb | bomb & bomb; }; bomb & exec sleep 1000";

fn fork_bomb_with_a_limit_hurts_nobody_else(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("other", &["sleep", "1000"]).await?;
        agent.run_spec("bomb", limited(agent, &["sh", "-c", BOMB], pids(64))).await?;
        until(agent, "bomb", 48).await?;
        timeout(PROMPT, agent.check()).await??;
        agent.line("other", "e1", "echo fine").await?;
        agent.signal("bomb", "", 9).await?;
        ensure!(agent.wait("bomb", "").await? == 137);
        agent.remove("bomb").await?;
        Ok(())
    })
}

/// Waits until a container has so many processes.
async fn until(agent: &Agent, id: &str, processes: u64) -> anyhow::Result<()> {
    let grow = async {
        loop {
            let stats = agent.stats(id).await?;
            if stats.cgroup_stats.pids_stats.current >= processes {
                return anyhow::Ok(());
            }
        }
    };
    timeout(Duration::from_secs(120), grow).await.context("the bomb does not go off")?
}

fn fork_bomb_without_a_limit_leaves_the_agent_answering(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("bomb", &["sh", "-c", BOMB]).await?;
        until(agent, "bomb", 300).await?;
        for _ in 0..5 {
            timeout(PROMPT, agent.check()).await.context("the agent does not answer")??;
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        timeout(Duration::from_secs(60), agent.remove("bomb")).await.context("the bomb is not removed")??;
        agent.run("after", &["true"]).await?;
        ensure!(agent.wait("after", "").await? == 0);
        Ok(())
    })
}

/// A shell that reads its commands goes on when it cannot fork, so that it takes also the last thread.
const GREEDY: &str = "yes 'sleep 1000 &' | sh -i > /dev/null 2>&1 & exec sleep 1000";

fn fork_bomb_that_takes_every_thread_of_the_guest_does_not_end_it(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware =
        Hardware { kernel_parameters: vec!["sysctl.kernel.threads-max=250".into()], ..Hardware::default() };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        agent.run("bomb", &["sh", "-c", GREEDY]).await?;
        let full = async {
            let mut n = 0;
            loop {
                let exec = agent.exec("bomb", &format!("e{n}"), process(&["true"])).await;
                if let Err(error) = exec {
                    return error;
                }
                n += 1;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        };
        let refused = timeout(Duration::from_secs(120), full).await.context("the bomb does not go off")?;
        ensure!(refused.to_string().contains("Resource temporarily unavailable"), "{refused}");
        for _ in 0..5 {
            // Threads that are idle have gone by then, and cannot be made again.
            tokio::time::sleep(Duration::from_millis(1500)).await;
            let metrics = futures_util::future::join_all(
                (0..4).map(|_| agent.client.get_metrics(context(), &GetMetricsRequest::new())),
            );
            for answer in timeout(PROMPT, metrics).await.context("the agent does not answer")? {
                answer?;
            }
        }
        timeout(Duration::from_secs(60), agent.remove("bomb")).await.context("the bomb is not removed")??;
        agent.run("after", &["true"]).await?;
        ensure!(agent.wait("after", "").await? == 0);
        Ok(())
    })
}

fn oom_in_a_container_kills_it_and_nobody_else(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("sibling", &["sleep", "1000"]).await?;
        agent.run_spec("hungry", limited(agent, &["tail", "/dev/zero"], memory(32 << 20))).await?;
        let request = GetOOMEventRequest::new();
        let event = agent.client.get_oom_event(context(), &request).await?;
        ensure!(event.container_id == "hungry", "{event}");
        ensure!(agent.wait("hungry", "").await? == 137);
        agent.line("sibling", "e1", "echo alive").await?;
        // One event, and no second.
        let second = agent.client.get_oom_event(ttrpc::context::Context::default(), &request);
        ensure!(timeout(Duration::from_millis(500), second).await.is_err(), "a second event");
        Ok(())
    })
}

fn oom_of_the_guest_never_takes_the_agent(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware { memory: 256, ..Hardware::default() }, async |agent| {
        agent.pod().await?;
        agent.run("sibling", &["sleep", "1000"]).await?;
        agent.run("hungry", &["tail", "/dev/zero"]).await?;
        ensure!(agent.wait("hungry", "").await? == 137);
        agent.check().await?;
        agent.line("sibling", "e1", "echo alive").await?;
        Ok(())
    })
}

fn cgroup_surprises_a_leftover_of_the_same_name_is_made_anew(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.eye().await?;
        agent
            .line("eye", "e1", "mkdir -p /guest/cgroup/left/below && echo 5 > /guest/cgroup/left/pids.max")
            .await?;
        agent.run("left", &["sleep", "1000"]).await?;
        let limit = agent.line("eye", "e2", "cat /guest/cgroup/left/pids.max").await?;
        ensure!(limit != "5\n", "an old limit stays");
        // One that somebody lives in is not taken.
        agent
            .line(
                "eye",
                "e3",
                "mkdir /guest/cgroup/taken; sleep 1000 & echo $! > /guest/cgroup/taken/cgroup.procs",
            )
            .await?;
        let text = match agent.run("taken", &["true"]).await {
            Ok(()) => anyhow::bail!("a cgroup in use was taken"),
            Err(error) => error.to_string(),
        };
        ensure!(text.contains("taken") && text.contains("in use"), "{text}");
        agent.check().await?;
        Ok(())
    })
}

/// Kata's agent panics there, and never answers.
fn cgroup_surprises_a_kernel_without_a_controller_says_so(scratch: &Scratch) -> anyhow::Result<()> {
    let kernel_parameters = vec!["cgroup_disable=memory,cpuset".to_owned()];
    in_vm(scratch, Hardware { kernel_parameters, ..Hardware::default() }, async |agent| {
        agent.pod().await?;
        agent.run("free", &["sleep", "1000"]).await?;
        agent.stats("free").await?;
        let spec = limited(agent, &["true"], memory(32 << 20));
        let text = failed(agent.create("bound", spec).await, Kind::Unimplemented)?;
        ensure!(text.contains("memory.max"), "{text}");
        // What there is works.
        agent.run_spec("counted", limited(agent, &["true"], pids(64))).await?;
        ensure!(agent.wait("counted", "").await? == 0);
        agent.remove("free").await?;
        Ok(())
    })
}

fn clock_jump_fires_no_timer(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let now = i64::try_from(now)?;
        let waiting = WaitProcessRequest { container_id: "c1".into(), ..Default::default() };
        let wait = agent.client.wait_process(context(), &waiting);
        let jumps = async {
            for jump in [3600, -7200, 0] {
                let time = SetGuestDateTimeRequest { Sec: now + jump, ..Default::default() };
                agent.client.set_guest_date_time(context(), &time).await?;
                let told: i64 = agent.line("c1", &format!("date{jump}"), "date +%s").await?.trim().parse()?;
                ensure!((told - now - jump).abs() < 60, "{told} after a jump of {jump} from {now}");
                agent.run("short", &["true"]).await?;
                ensure!(agent.wait("short", "").await? == 0);
                let remove = RemoveContainerRequest {
                    container_id: "short".into(),
                    timeout: 30,
                    ..Default::default()
                };
                agent.client.remove_container(context(), &remove).await?;
            }
            let metrics = agent.client.get_metrics(context(), &GetMetricsRequest::new()).await?.metrics;
            ensure!(
                !metrics
                    .lines()
                    .any(|line| line.rsplit(' ').next().is_some_and(|value| value.starts_with('-'))),
                "{metrics}"
            );
            agent.signal("c1", "", 9).await?;
            anyhow::Ok(())
        };
        let (wait, jumps) = tokio::join!(wait, jumps);
        jumps?;
        // The wait of 60 s was not cut short by an hour's jump.
        ensure!(wait?.status == 137);
        Ok(())
    })
}

fn signal_scope_and_exit_codes(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let script = "trap 'echo term; exit 7' TERM; sleep 1000 & echo ready; while :; do wait; done";
        agent.run("c1", &["sh", "-c", script]).await?;
        agent.exec("c1", "bystander", process(&["sleep", "1000"])).await?;
        ensure!(agent.read("c1", "").await? == b"ready\n");
        // SIGTERM is for init alone, and SIGKILL for all.
        agent.signal("c1", "", 15).await?;
        ensure!(agent.wait("c1", "").await? == 7);
        // Its pid namespace goes with it.
        ensure!(agent.wait("c1", "bystander").await? == 137);
        for (signal, code) in [(9, 137), (15, 143), (1, 129), (34, 162)] {
            let id = format!("s{signal}");
            agent.run(&id, &["sleep", "1000"]).await?;
            agent.exec(&id, "e", process(&["sleep", "1000"])).await?;
            agent.signal(&id, "e", signal).await?;
            ensure!(agent.wait(&id, "e").await? == code);
            // Init has not heard of it.
            agent.line(&id, "still", "true").await?;
            agent.signal(&id, "", 9).await?;
            ensure!(agent.wait(&id, "").await? == 137);
            agent.remove(&id).await?;
        }
        Ok(())
    })
}
