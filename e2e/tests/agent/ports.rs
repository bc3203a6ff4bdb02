//! The agent's other ports, and what it is told on the kernel's command line.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Hardware, context, failed, in_vm, mount, process},
    cases,
};
use bulkhead_protocol::{agent::*, oci, ports, protobuf::MessageField, status::Kind};
use sha2::{Digest, Sha256};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::UnixStream,
};

pub(super) const CASES: &[Case] = cases![
    logs_are_read_from_the_boot_on_and_by_whoever_comes_back,
    ports_that_nobody_asked_for_are_closed,
    a_debug_console_says_what_is_missing_and_then_works,
    streams_flow_over_connections_of_the_host,
    spans_reach_the_host,
    wrong_words_on_the_kernel_line_do_not_keep_the_guest_from_its_work,
];

/// Nothing here takes this long; a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

fn hardware(words: &[&str]) -> Hardware {
    Hardware {
        kernel_parameters: words.iter().map(|word| (*word).to_owned()).collect(),
        ..Hardware::default()
    }
}

async fn within<T>(what: &str, work: impl Future<Output = T>) -> anyhow::Result<T> {
    tokio::time::timeout(PATIENCE, work).await.with_context(|| format!("{what}: nothing for a minute"))
}

/// Lines of a reader up to one that has these words.
async fn lines_to(reader: &mut BufReader<UnixStream>, words: &str) -> anyhow::Result<Vec<serde_json::Value>> {
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        let read = within(words, reader.read_line(&mut line)).await??;
        ensure!(read > 0, "the log has ended before {words:?}");
        lines.push(serde_json::from_str(&line).with_context(|| line.clone())?);
        if line.contains(words) {
            return Ok(lines);
        }
    }
}

/// Makes the agent log a line with these words.
async fn provoke(agent: &Agent, id: &str) -> anyhow::Result<()> {
    let request = CreateContainerRequest {
        container_id: id.into(),
        stdout_port: 1,
        OCI: MessageField::some(oci::Spec::default()),
        ..Default::default()
    };
    failed(agent.client.create_container(context(), &request).await, Kind::Unimplemented)?;
    Ok(())
}

fn logs_are_read_from_the_boot_on_and_by_whoever_comes_back(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(
        scratch,
        hardware(&["agent.log_vport=1025", "agent.log=debug", "agent.logvport=1"]),
        async |agent| {
            let mut first = BufReader::new(agent.dial(ports::LOG).await?);
            let boot = lines_to(&mut first, "ready for containers").await?;
            for key in ["msg", "level", "ts", "name", "source", "subsystem", "pid", "version"] {
                ensure!(boot.iter().all(|line| line[key].is_string()), "{key} is missing: {boot:?}");
            }
            let says = |lines: &[serde_json::Value], words: &str| {
                lines.iter().any(|line| line["msg"].as_str().is_some_and(|text| text.contains(words)))
            };
            ensure!(says(&boot, "is agent.log_vport meant?") && says(&boot, "taking requests"), "{boot:?}");
            ensure!(boot.iter().all(|line| line["pid"] == "1"), "{boot:?}");
            drop(first);

            // What is logged while nobody reads waits for the next reader. Two may read at a time.
            let closed = agent.try_dial(ports::DEBUG_CONSOLE).await?;
            ensure!(closed.is_none(), "nobody asked for a debug console");
            let mut second = BufReader::new(agent.dial(ports::LOG).await?);
            let mut third = BufReader::new(agent.dial(ports::LOG).await?);
            agent.pod().await?;
            // Both stay until the guest ends.
            agent.client.destroy_sandbox(context(), &DestroySandboxRequest::new()).await?;
            let (mut two, mut three) = (String::new(), String::new());
            within("the end", second.read_to_string(&mut two)).await??;
            within("the end", third.read_to_string(&mut three)).await??;
            ensure!(!two.contains("taking requests"), "the second reader is told nothing twice: {two}");
            agent.ended().await
        },
    )
}

fn ports_that_nobody_asked_for_are_closed(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        for port in [ports::LOG, ports::DEBUG_CONSOLE, ports::STREAMS] {
            ensure!(agent.try_dial(port).await?.is_none(), "port {port} is open");
        }
        provoke(agent, "c1").await
    })
}

async fn type_and_read(agent: &Agent, text: &str) -> anyhow::Result<String> {
    let mut console = agent.dial(ports::DEBUG_CONSOLE).await?;
    console.write_all(text.as_bytes()).await?;
    let mut said = Vec::new();
    within("the console", console.read_to_end(&mut said)).await??;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

fn a_debug_console_says_what_is_missing_and_then_works(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = hardware(&["agent.debug_console", "agent.debug_console_vport=1026"]);
    in_vm(scratch, hardware, async |agent| {
        let said = type_and_read(agent, "").await?;
        ensure!(said.contains("no shell") && said.contains("/bin/bash"), "{said:?}");

        // A container that may see the guest's own root puts a shell there.
        agent.pod().await?;
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Mounts.push(mount("/guest", "bind", "/", &["rbind", "rw"]));
        agent.run_spec("c1", spec).await?;
        agent.line("c1", "copy", "mkdir -p /guest/bin && cp /bin/busybox /guest/bin/sh").await?;
        let said =
            type_and_read(agent, "echo $((6 * 7)) pid $PPID; test -t 0 && echo terminal; exit\n").await?;
        ensure!(said.contains("42 pid 1") && said.contains("terminal\r\n"), "{said:?}");

        // Who hangs up takes the shell along.
        let mut console = agent.dial(ports::DEBUG_CONSOLE).await?;
        console.write_all(b"echo re''ady; sleep 4321\n").await?;
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains("ready\r\n") {
            ensure!(within("the shell", console.read_buf(&mut said)).await?? > 0, "{said:?}");
        }
        drop(console);
        let gone = "for n in $(seq 600); do grep -qs '432[1]' /guest/proc/[0-9]*/cmdline || exit 0; sleep 0.1; done; exit 1";
        agent.line("c1", "gone", gone).await?;
        Ok(())
    })
}

fn streams_flow_over_connections_of_the_host(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = hardware(&["agent.passfd_listener_port=1027"]);
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let request = |exec_id: &str, command: &[&str], terminal: bool, ports: [u32; 3]| {
            let [stdin_port, stdout_port, stderr_port] = ports;
            let process = oci::Process { Terminal: terminal, ..process(command) };
            ExecProcessRequest {
                container_id: "c1".into(),
                exec_id: exec_id.into(),
                process: MessageField::some(process),
                stdin_port,
                stdout_port,
                stderr_port,
                ..Default::default()
            }
        };

        // Two megabytes there and back, and a hash of them besides.
        let data: Vec<u8> = (0..2u32 << 20).map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect();
        let (mut stdin, stdin_port) = agent.dial_from(ports::STREAMS).await?;
        let (mut stdout, stdout_port) = agent.dial_from(ports::STREAMS).await?;
        let (mut stderr, stderr_port) = agent.dial_from(ports::STREAMS).await?;
        let exec = request(
            "e1",
            &["sh", "-c", "tee /tmp/data; sha256sum < /tmp/data >&2; exit 42"],
            false,
            [stdin_port, stdout_port, stderr_port],
        );
        agent.client.exec_process(context(), &exec).await?;
        let sent = data.clone();
        let sending = tokio::spawn(async move {
            stdin.write_all(&sent).await?;
            stdin.shutdown().await
        });
        let (mut out, mut err) = (Vec::new(), String::new());
        within("output", stdout.read_to_end(&mut out)).await??;
        within("errors", stderr.read_to_string(&mut err)).await??;
        sending.await??;
        ensure!(out == data, "{} of {} bytes came back", out.len(), data.len());
        let hash: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
        ensure!(err.starts_with(&hash), "{err}");
        ensure!(agent.wait("c1", "e1").await? == 42, "the exit code");

        // A background process that keeps the output does not keep the exit.
        let (mut stdout, stdout_port) = agent.dial_from(ports::STREAMS).await?;
        let exec = request("e2", &["sh", "-c", "sleep 1000 & echo done; exit 7"], false, [0, stdout_port, 0]);
        agent.client.exec_process(context(), &exec).await?;
        ensure!(within("the exit", agent.wait("c1", "e2")).await?? == 7, "the exit code");
        let mut out = String::new();
        within("output", stdout.read_to_string(&mut out)).await??;
        ensure!(out == "done\n", "{out:?}");

        // A terminal has one output.
        let (mut stdin, stdin_port) = agent.dial_from(ports::STREAMS).await?;
        let (mut stdout, stdout_port) = agent.dial_from(ports::STREAMS).await?;
        let exec = request(
            "e3",
            &["sh", "-c", "read line; test -t 1 && echo \"<$line>\""],
            true,
            [stdin_port, stdout_port, 0],
        );
        agent.client.exec_process(context(), &exec).await?;
        stdin.write_all(b"hello\n").await?;
        let mut out = String::new();
        within("output", stdout.read_to_string(&mut out)).await??;
        ensure!(out.contains("<hello>\r\n"), "{out:?}");
        ensure!(agent.wait("c1", "e3").await? == 0, "the exit code");

        // Without input nothing is typed into a terminal.
        let (mut stdout, stdout_port) = agent.dial_from(ports::STREAMS).await?;
        let line = "timeout 2 cat; echo \"<$?>\"";
        agent
            .client
            .exec_process(context(), &request("e7", &["sh", "-c", line], true, [0, stdout_port, 0]))
            .await?;
        let mut out = String::new();
        within("output", stdout.read_to_string(&mut out)).await??;
        ensure!(out.contains("<143>"), "it did not wait for input: {out:?}");

        // A port that nobody connected from is named, and nothing was started.
        let refused =
            agent.client.exec_process(context(), &request("e4", &["true"], false, [0, 77, 0])).await;
        let text = failed(refused, Kind::InvalidArgument)?;
        ensure!(text.contains("stdout_port 77"), "{text}");
        failed(agent.wait("c1", "e4").await, Kind::NotFound)?;

        // A container's init, too; and one whose output nobody reads can be removed.
        let (mut stdout, stdout_port) = agent.dial_from(ports::STREAMS).await?;
        let create = CreateContainerRequest {
            container_id: "c2".into(),
            OCI: MessageField::some(agent.spec(&["sh", "-c", "echo first; while :; do echo more; done"])),
            stdout_port,
            ..Default::default()
        };
        agent.client.create_container(context(), &create).await?;
        agent.start_container("c2").await?;
        let mut first = [0; 6];
        within("output", stdout.read_exact(&mut first)).await??;
        ensure!(&first == b"first\n", "{first:?}");
        within("the removal", agent.remove("c2")).await??;

        // And one with an exec that has ended, whose output nobody reads: who waits for that is answered.
        let (_stdout, stdout_port) = agent.dial_from(ports::STREAMS).await?;
        let exec = request("e5", &["sh", "-c", "yes & sleep 2; exit 5"], false, [0, stdout_port, 0]);
        agent.client.exec_process(context(), &exec).await?;
        let wait = agent.wait("c1", "e5");
        let removal = async {
            agent.line("c1", "e6", "while ps | grep -v grep | grep -q 'sleep 2$'; do sleep 1; done").await?;
            anyhow::Ok(agent.remove("c1").await?)
        };
        let (code, removed) = within("the end of the exec", async { tokio::join!(wait, removal) }).await?;
        removed?;
        ensure!(code? == 5, "the exit code");
        Ok(())
    })
}

fn spans_reach_the_host(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, hardware(&["agent.trace=true"]), async |agent| {
        let collector = agent.listen(ports::TRACE)?;
        let mut traced = context();
        traced.add("traceparent".into(), "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into());
        agent.client.get_guest_details(traced, &GuestDetailsRequest::new()).await?;
        let (mut connection, _) = within("the collector", collector.accept()).await??;
        let length = within("a span", connection.read_u64()).await??;
        let mut json = vec![0; usize::try_from(length)?];
        within("a span", connection.read_exact(&mut json)).await??;
        let text = String::from_utf8(json)?;
        let span: serde_json::Value = serde_json::from_str(&text)?;
        let trace = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128;
        ensure!(
            span["name"] == "get_guest_details" && text.contains(&format!("\"trace_id\":{trace},")),
            "{text}"
        );
        Ok(())
    })
}

fn wrong_words_on_the_kernel_line_do_not_keep_the_guest_from_its_work(
    scratch: &Scratch,
) -> anyhow::Result<()> {
    let words = [
        "agent.log=loud",
        "agent.hotplug_timeout=-1",
        "agent.config_file=/etc/no.toml",
        "agent.server_addr=tcp://x",
        "agent.mem_agent_enable=1",
        "agent.log_vport=1025",
    ];
    in_vm(scratch, hardware(&words), async |agent| {
        agent.check().await?;
        let mut log = BufReader::new(agent.dial(ports::LOG).await?);
        let told = lines_to(&mut log, "ready for containers").await?;
        for words in [
            "agent.log: loud is not",
            "agent.hotplug_timeout: -1 is not",
            "/etc/no.toml",
            "agent.server_addr: tcp://x is not",
            "mem-agent",
        ] {
            let says =
                |line: &serde_json::Value| line["msg"].as_str().is_some_and(|text| text.contains(words));
            ensure!(told.iter().any(says), "{words} is not told: {told:?}");
        }
        let metrics = agent.client.get_metrics(context(), &GetMetricsRequest::new()).await?.metrics;
        ensure!(metrics.contains("kata_guest_meminfo{item=\"mem_total\"}"), "{metrics}");
        Ok(())
    })
}
