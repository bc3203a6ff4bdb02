//! The guest's image: what it holds beside the agent, in an initramfs or on a disk.

use std::{os::unix::fs::symlink, process::Command, time::Duration};

use anyhow::{Context as _, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Disk, Extra, Hardware, context, failed, in_vm, process},
    cases,
};
use bulkhead_protocol::{
    agent::{GetIPTablesRequest, KernelModule},
    oci::POSIXRlimit,
    ports,
    status::Kind,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

pub(super) const CASES: &[Case] = cases![
    the_image_is_what_the_guest_finds,
    the_policy_of_the_image_is_in_force,
    a_policy_that_is_named_and_missing_ends_the_guest,
    a_shell_that_cannot_be_run_costs_nothing_but_the_console,
    a_root_on_a_disk_that_cannot_be_written_holds_containers,
];

const BUSYBOX: &str = "/bin/busybox";

/// A busybox, its shell and more files; and a debug console.
fn hardware(more: Vec<Extra>) -> anyhow::Result<Hardware> {
    let mut files = vec![
        Extra::file("bin/busybox", 0o755, std::fs::read(BUSYBOX)?),
        Extra::link("bin/sh", "busybox"),
        Extra::link("usr/bin/sh", "/bin/busybox"),
    ];
    files.extend(more);
    let kernel_parameters =
        ["agent.debug_console", "agent.debug_console_vport=1026"].map(str::to_owned).into();
    Ok(Hardware { files, kernel_parameters, ..Hardware::default() })
}

fn script(path: &str, lines: &str) -> Extra {
    Extra::file(path, 0o755, format!("#!/bin/sh\n{lines}\n"))
}

/// What the debug console says until it ends.
async fn console(agent: &Agent, typed: &str) -> anyhow::Result<String> {
    let mut console = agent.dial(ports::DEBUG_CONSOLE).await?;
    // A shell that could not be run may have hung up already.
    let _ = console.write_all(typed.as_bytes()).await;
    let mut said = Vec::new();
    let end = tokio::time::timeout(Duration::from_secs(60), console.read_to_end(&mut said));
    end.await.context("the console does not end")??;
    Ok(String::from_utf8_lossy(&said).into_owned())
}

fn the_image_is_what_the_guest_finds(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = hardware(vec![
        Extra::file("etc/motd", 0o644, "welcome\n"),
        Extra::file("etc/resolv.conf", 0o644, "nameserver 192.0.2.99\n"),
        script("usr/sbin/iptables-save", "echo '*filter of the image'"),
        script("sbin/modprobe", "[ \"$2\" != nosuch ] && echo \"$@\" >> /modules"),
        script("usr/share/oci/hooks/prestart/10-first", "echo hooked > /run/hooked"),
    ])?;
    in_vm(scratch, hardware, async |agent| {
        let mut request = agent.pod_request();
        request.guest_hook_path = "/usr/share/oci/hooks".into();
        request.dns = vec!["nameserver 192.0.2.1".into()];
        let module = |name: &str, parameter: &str| KernelModule {
            name: name.into(),
            parameters: vec![parameter.into()],
            ..Default::default()
        };
        request.kernel_modules = vec![module("surely_of_the_image", "a=1")];
        let mut wrong = request.clone();
        wrong.kernel_modules = vec![module("nosuch", "")];
        let text = failed(agent.client.create_sandbox(context(), &wrong).await, Kind::InvalidArgument)?;
        ensure!(text.contains("nosuch") && text.contains("/sbin/modprobe"), "{text}");
        agent.client.create_sandbox(context(), &request).await?;
        let rules = agent.client.get_ip_tables(context(), &GetIPTablesRequest::new()).await?.data;
        ensure!(rules == b"*filter of the image\n", "{rules:?}");

        // As many open files as engines ask for when they mean any number.
        let mut spec = agent.spec(&["sleep", "1000"]);
        let limit =
            POSIXRlimit { Type: "RLIMIT_NOFILE".into(), Hard: 1 << 30, Soft: 1 << 30, ..Default::default() };
        spec.Process.mut_or_insert_default().Rlimits = vec![limit];
        agent.run_spec("c1", spec).await?;
        let limits = agent.line("c1", "limit", "grep 'open files' /proc/1/limits").await?;
        ensure!(limits.contains("1073741824"), "{limits}");

        let said = console(
            agent,
            "PATH=; b=/bin/busybox; $b cat /etc/motd /run/hooked /modules /etc/resolv.conf; \
             $b stat -c 'root %a' /; $b ls /lib/bulkhead/modules/demand | $b grep -c lz4; \
             until ! [ -e /init ]; do $b sleep 0.1; done; \
             echo early $($b ls /lib/bulkhead/modules/early) late $($b ls /lib/bulkhead/modules/late) end; exit\n",
        )
        .await?;
        for words in [
            "welcome\r\n",
            "hooked\r\n",
            "-v surely_of_the_image a=1\r\n",
            "nameserver 192.0.2.1\r\n",
            "root 755\r\n",
            "early late end\r\n",
        ] {
            ensure!(said.contains(words), "{words:?} in {said}");
        }
        ensure!(!said.contains("192.0.2.99"), "{said}");
        ensure!(!said.contains("\r\n0\r\n"), "no modules on demand: {said}");
        Ok(())
    })
}

fn the_policy_of_the_image_is_in_force(scratch: &Scratch) -> anyhow::Result<()> {
    // As images have it: a link to one of several.
    let policy = "package agent_policy
        CreateSandboxRequest := true
        CreateContainerRequest := true
        StartContainerRequest := true";
    let hardware = hardware(vec![
        Extra::file("etc/kata-opa/no-exec.rego", 0o644, policy),
        Extra::link("etc/kata-opa/default-policy.rego", "no-exec.rego"),
    ])?;
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let denied = failed(agent.exec("c1", "e1", process(&["true"])).await, Kind::PermissionDenied)?;
        ensure!(denied == "ExecProcessRequest is blocked by policy", "{denied}");
        Ok(())
    })
}

fn a_policy_that_is_named_and_missing_ends_the_guest(scratch: &Scratch) -> anyhow::Result<()> {
    let hardware = Hardware {
        kernel_parameters: vec!["KATA_AGENT_POLICY_FILE=/etc/none.rego".into()],
        ..Hardware::default()
    };
    let ended = in_vm(scratch, hardware, async |_| Ok(()));
    let error = format!("{:#}", ended.err().context("the agent takes requests")?);
    ensure!(error.contains("read the policy /etc/none.rego: No such file"), "{error}");
    Ok(())
}

fn a_shell_that_cannot_be_run_costs_nothing_but_the_console(scratch: &Scratch) -> anyhow::Result<()> {
    let mut hardware = hardware(Vec::new())?;
    hardware.files = vec![
        Extra::file("bin/bash", 0o644, "not a program"),
        Extra::file("bin/sh", 0o755, "#!/no/interpreter\n"),
    ];
    in_vm(scratch, hardware, async |agent| {
        // Often, because what went wrong was a race.
        for _ in 0..20 {
            let said = console(agent, "").await?;
            ensure!(said.contains("no debug console: run /bin/sh: No such file"), "{said:?}");
            ensure!(said.ends_with("\r\n"), "{said:?}");
        }
        agent.check().await?;
        Ok(())
    })
}

/// The initramfs hands over to a disk whose `/init` is the agent, as a distribution's does.
fn a_root_on_a_disk_that_cannot_be_written_holds_containers(scratch: &Scratch) -> anyhow::Result<()> {
    let hand_over = "b=/bin/busybox
        $b mkdir -p /root /dev
        $b mount -t devtmpfs devtmpfs /dev
        for module in /lib/bulkhead/modules/early/* /lib/bulkhead/modules/late/*; do $b insmod $module; done
        until [ -b /dev/vda ]; do $b sleep 0.1; done
        $b mount -t ext4 -o ro /dev/vda /root
        $b mount -o move /dev /root/dev
        exec $b switch_root /root /init";
    let mut hardware = hardware(vec![script("start", hand_over)])?;
    hardware.kernel_parameters.push("rdinit=/start".into());
    let tree = scratch.path().join("root.tree");
    for directory in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
        std::fs::create_dir_all(tree.join(directory))?;
    }
    let agent = std::env::var_os("BULKHEAD_AGENT").map_or_else(
        || scratch.prefix().root.join("libexec/bulkhead/bulkhead-agent"),
        std::path::PathBuf::from,
    );
    std::fs::copy(agent, tree.join("init"))?;
    std::fs::copy(BUSYBOX, tree.join("bin/busybox"))?;
    symlink("busybox", tree.join("bin/sh"))?;
    std::fs::write(tree.join("etc/resolv.conf"), "nameserver 192.0.2.99\n")?;
    let disk = scratch.path().join("root.img");
    std::fs::File::create(&disk)?.set_len(64 << 20)?;
    let made = Command::new("mkfs.ext4").args(["-q", "-d"]).arg(&tree).arg(&disk).status()?;
    ensure!(made.success(), "mkfs.ext4: {made}");
    hardware.disks.push(Disk { read_only: true, ..Disk::new(disk) });

    in_vm(scratch, hardware, async |agent| {
        let mut request = agent.pod_request();
        request.dns = vec!["nameserver 192.0.2.1".into()];
        agent.client.create_sandbox(context(), &request).await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        ensure!(agent.line("c1", "e1", "echo lives").await? == "lives\n");
        let said = console(
            agent,
            "PATH=; b=/bin/busybox; $b cat /etc/resolv.conf; $b grep '^/dev/vda / ' /proc/mounts; $b ls -d /init; exit\n",
        )
        .await?;
        for words in ["nameserver 192.0.2.1\r\n", "/dev/vda / ext4 ro", "\r\n/init\r\n"] {
            ensure!(said.contains(words), "{words:?} in {said}");
        }
        Ok(())
    })
}
