//! Much of everything: execs, output, input, arguments, containers at once. Most of it against a plain process, whose
//! descriptors and memory can be counted from outside.

use std::{io::Write, process::Stdio, time::Duration};

use anyhow::{Context, bail, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, in_vm, plain, process},
    cases,
};
use bulkhead_protocol::status::{Kind, message};
use futures_util::future::try_join_all;
use tokio::time::timeout;

pub(super) const CASES: &[Case] = cases![
    exec_storm_of_1000_leaves_descriptors_and_memory_flat,
    exec_storm_in_a_guest_leaves_descriptors_flat,
    stdout_flood_with_a_slow_a_deaf_and_a_dying_reader_stops_nobody_else,
    big_stdin_arrives_whole,
    big_stdin_arrives_whole_in_a_guest,
    huge_arguments_and_environments_are_refused_in_words,
    concurrent_create_and_delete_leaves_nothing,
];

const PROMPT: Duration = Duration::from_secs(10);
const MIB: usize = 1 << 20;

async fn storm(agent: &Agent, prefix: &str, workers: usize, each: usize) -> anyhow::Result<()> {
    let work = (0..workers).map(|worker| async move {
        for n in 0..each {
            let id = format!("{prefix}{worker}-{n}");
            let (output, code) = agent.shell("c1", &id, &format!("echo {id}")).await?;
            ensure!(code == 0 && output == format!("{id}\n"), "{id}: {code} {output}");
            agent.stderr("c1", &id).await?;
        }
        anyhow::Ok(())
    });
    try_join_all(work).await.map(drop)
}

fn exec_storm_of_1000_leaves_descriptors_and_memory_flat(scratch: &Scratch) -> anyhow::Result<()> {
    plain(scratch, async |agent| {
        agent.run("c1", &["sleep", "1000"]).await?;
        // As many as are remembered, so that the table has its size.
        storm(agent, "warm", 8, 130).await?;
        let (descriptors, resident) = (agent.descriptors()?, agent.resident()?);
        storm(agent, "e", 8, 125).await?;
        ensure!(
            agent.descriptors()? == descriptors,
            "{descriptors} descriptors became {}",
            agent.descriptors()?
        );
        let grown = agent.resident()?.saturating_sub(resident);
        ensure!(grown < 1 << 20, "{grown} bytes more than {resident}");
        // Who never reads does not keep descriptors without bound either.
        for n in 0..200 {
            let id = format!("unread{n}");
            agent.exec("c1", &id, process(&["true"])).await?;
            ensure!(agent.wait("c1", &id).await? == 0);
        }
        agent.remove("c1").await?;
        ensure!(
            agent.descriptors()? <= descriptors,
            "{descriptors} descriptors became {}",
            agent.descriptors()?
        );
        Ok(())
    })
}

fn exec_storm_in_a_guest_leaves_descriptors_flat(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.eye().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let count = async |id: &str| -> anyhow::Result<i64> {
            let count = agent.line("eye", id, "ls /guest/proc/1/fd | wc -l").await?;
            agent.stderr("eye", id).await?;
            Ok(count.trim().parse()?)
        };
        storm(agent, "warm", 4, 2).await?;
        count("first").await?;
        let before = count("before").await?;
        storm(agent, "e", 4, 10).await?;
        let after = count("after").await?;
        ensure!(after == before, "{before} descriptors became {after}");
        Ok(())
    })
}

fn stdout_flood_with_a_slow_a_deaf_and_a_dying_reader_stops_nobody_else(
    scratch: &Scratch,
) -> anyhow::Result<()> {
    plain(scratch, async |agent| {
        agent.run("c1", &["sleep", "1000"]).await?;
        agent.shell("c1", "warm", "echo").await?;
        let resident = agent.resident()?;
        for id in ["deaf", "slow", "dying", "counted"] {
            let program = if id == "counted" { "seq 1 300000" } else { "yes" };
            agent.exec("c1", id, process(&["sh", "-c", program])).await?;
        }
        // One reader is cut off while it waits for more; a flood that is drained ends in a wait.
        let dying = agent.another_client().await?;
        for _ in 0..10 {
            let request = bulkhead_protocol::agent::ReadStreamRequest {
                container_id: "c1".into(),
                exec_id: "dying".into(),
                len: 1 << 20,
                ..Default::default()
            };
            dying.read_stdout(bulkhead_e2e::agent::context(), &request).await?;
        }
        drop(dying);
        for n in 0..50 {
            ensure!(agent.read("c1", "slow").await?.starts_with(b"y\n"));
            let (output, _) = timeout(PROMPT, agent.shell("c1", &format!("other{n}"), "echo fine")).await??;
            ensure!(output == "fine\n", "{output}");
        }
        // Nobody has read this until now, and not a byte is lost.
        let expected: String = (1..=300_000).map(|n| format!("{n}\n")).collect();
        ensure!(agent.stdout("c1", "counted").await? == expected, "some of the output is lost");
        let grown = agent.resident()?.saturating_sub(resident);
        ensure!(grown < 8 << 20, "{grown} bytes more than {resident}");
        for id in ["deaf", "slow", "dying"] {
            agent.signal("c1", id, 9).await?;
            ensure!(agent.wait("c1", id).await? == 137);
        }
        Ok(())
    })
}

fn big_stdin_arrives_whole(scratch: &Scratch) -> anyhow::Result<()> {
    plain(scratch, async |agent| stdin(agent, 1024).await)
}

fn big_stdin_arrives_whole_in_a_guest(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        stdin(agent, 64).await
    })
}

/// Sends so many different MiB to `sha256sum` in a container, and the same to the host's.
async fn stdin(agent: &Agent, mib: usize) -> anyhow::Result<()> {
    agent.run("c1", &["sleep", "1000"]).await?;
    agent.exec("c1", "sum", process(&["sha256sum"])).await?;
    let mut host =
        std::process::Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut host_end = host.stdin.take().context("piped")?;
    let mut chunk: Vec<u8> = (0..MIB).map(|n| u8::try_from(n * 31 % 251).unwrap_or(0)).collect();
    for n in 0..mib {
        chunk[..8].copy_from_slice(&n.to_be_bytes());
        host_end.write_all(&chunk)?;
        ensure!(agent.write("c1", "sum", &chunk).await? == u32::try_from(MIB)?);
    }
    drop(host_end);
    agent.close("c1", "sum").await?;
    let expected = String::from_utf8(host.wait_with_output()?.stdout)?;
    let output = agent.stdout("c1", "sum").await?;
    ensure!(output == expected, "{output} is not {expected}");
    ensure!(agent.wait("c1", "sum").await? == 0);
    Ok(())
}

fn huge_arguments_and_environments_are_refused_in_words(scratch: &Scratch) -> anyhow::Result<()> {
    plain(scratch, async |agent| {
        agent.run("c1", &["sleep", "1000"]).await?;
        // What the kernel takes arrives.
        let mut large = process(&["sh", "-c", "for a; do n=$((n + ${#a})); done; echo $n", "sh"]);
        large.Args.extend((0..10).map(|_| "x".repeat(100_000)));
        large.Env.extend((0..5).map(|n| format!("V{n}={}", "y".repeat(100_000))));
        let (output, code) = agent.output("c1", "large", large).await?;
        ensure!(code == 0 && output == "1000000\n", "{code} {output}");
        // A string of 2 MiB and a sum of 3 are more than the kernel takes.
        let single = format!("V={}", "x".repeat(2 * MIB));
        let many: Vec<_> = (0..30).map(|n| format!("V{n}={}", "x".repeat(100_000))).collect();
        for (id, environment) in [("single", vec![single]), ("many", many)] {
            let mut process = process(&["true"]);
            process.Env.extend(environment);
            let error = agent.exec("c1", id, process).await.err().context("it was taken")?;
            ensure!(message(&error).contains("too long"), "{}", message(&error));
        }
        // 5 MiB are more than a message may have.
        let mut process = process(&["true"]);
        process.Args.push("x".repeat(5 * MIB));
        ensure!(agent.exec("c1", "over", process).await.is_err());
        agent.check().await?;
        agent.line("c1", "after", "echo fine").await?;
        Ok(())
    })
}

/// Workers that get in each other's way: every answer is one that fits, and in the end nothing is left.
fn concurrent_create_and_delete_leaves_nothing(scratch: &Scratch) -> anyhow::Result<()> {
    plain(scratch, async |agent| {
        agent.run("warm", &["true"]).await?;
        agent.wait("warm", "").await?;
        agent.remove("warm").await?;
        let descriptors = settled(agent).await?;
        let work = (0..16).map(|worker| async move {
            for round in 0..12 {
                // Six names for sixteen workers.
                let id = format!("c{}", (worker + round * 5) % 6);
                allowed(agent.create(&id, agent.spec(&["sleep", "1000"])).await)?;
                allowed(agent.start_container(&id).await)?;
                allowed(agent.exec(&id, &format!("e{worker}-{round}"), process(&["true"])).await)?;
                allowed(agent.signal(&id, "", 15).await)?;
                allowed(agent.remove(&id).await)?;
                if round % 3 == 0 {
                    allowed(agent.remove(&id).await)?;
                }
            }
            anyhow::Ok(())
        });
        timeout(Duration::from_secs(120), try_join_all(work)).await.context("somebody hangs")??;
        for n in 0..6 {
            agent.remove(&format!("c{n}")).await?;
        }
        let children = format!("/proc/{0}/task/{0}/children", agent.pid()?);
        let children = std::fs::read_to_string(children)?;
        ensure!(children.is_empty(), "processes are left: {children}");
        let left = settled(agent).await?;
        ensure!(left == descriptors, "{descriptors} descriptors became {left}");
        agent.run("after", &["true"]).await?;
        ensure!(agent.wait("after", "").await? == 0);
        Ok(())
    })
}

/// What one may hear of a container that others make and remove meanwhile.
fn allowed<T>(result: ttrpc::Result<T>) -> anyhow::Result<()> {
    let Err(error) = result else { return Ok(()) };
    match Kind::of_error(&error) {
        Kind::AlreadyExists | Kind::NotFound | Kind::InvalidArgument | Kind::FailedPrecondition => Ok(()),
        kind => bail!("{kind:?}: {error}"),
    }
}

/// The agent's descriptors, once the last of what was removed has been closed behind the answer.
async fn settled(agent: &Agent) -> anyhow::Result<usize> {
    loop {
        let before = agent.descriptors()?;
        tokio::time::sleep(Duration::from_millis(200)).await;
        if agent.descriptors()? == before {
            return Ok(before);
        }
    }
}
