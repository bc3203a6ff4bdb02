//! What a container must not reach: the guest's devices, the agent's own process, other namespaces, paths behind links.

use anyhow::{Context, ensure};
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Agent, Disk, Hardware, grant, in_vm, mount, process},
    cases,
};
use bulkhead_protocol::{oci, status::message};

pub(super) const CASES: &[Case] = cases![
    cve_2020_2023_device_nodes_of_the_guest_cannot_be_opened,
    cve_2016_9962_a_process_on_its_way_in_cannot_be_seen,
    cve_2019_19921_links_in_the_place_of_kernel_file_systems_are_refused,
    exec_joins_the_container_and_not_where_its_init_went,
];

/// A process with capabilities, for a shell line.
fn with(line: &str, capabilities: &[&str]) -> oci::Process {
    let mut process = process(&["sh", "-c", &format!("exec 2>&1; {line}")]);
    grant(&mut process, capabilities);
    process
}

fn cve_2020_2023_device_nodes_of_the_guest_cannot_be_opened(scratch: &Scratch) -> anyhow::Result<()> {
    let disk = scratch.path().join("disk");
    std::fs::File::create(&disk)?.set_len(1 << 20)?;
    let hardware = Hardware { disks: vec![Disk::new(disk)], ..Hardware::default() };
    in_vm(scratch, hardware, async |agent| {
        agent.pod().await?;
        // Every capability that could help, and a device file system that may hold nodes.
        let rights = ["CAP_MKNOD", "CAP_SYS_ADMIN", "CAP_SYS_RAWIO", "CAP_DAC_OVERRIDE", "CAP_SYSLOG"];
        let line = "set -e; cd /dev; mount -t sysfs sysfs /sys; IFS=:; read a b < /sys/block/vda/dev; IFS=' '\n\
            mknod disk b $a $b; mknod kmsg c 1 11; mknod mem c 1 1; mknod port c 1 4; mknod fine c 1 5; set +e\n\
            for node in disk kmsg mem port; do dd if=$node of=null bs=1 count=1 2>&1; dd if=null of=$node bs=1 count=1 conv=notrunc 2>&1; done\n\
            head -c 3 fine | wc -c; echo over";
        let mut spec = agent.spec(&["sh", "-c", &format!("exec 2>&1; {line}; exec sleep 1000")]);
        grant(spec.Process.mut_or_insert_default(), &rights);
        agent.run_spec("c1", spec).await?;
        let mut init = String::new();
        while !init.contains("over") {
            init += &String::from_utf8_lossy(&agent.read("c1", "").await?);
        }
        let line = format!("rm -f /dev/disk /dev/kmsg /dev/mem /dev/port /dev/fine; umount /sys; {line}");
        let (exec, _) = agent.output("c1", "e1", with(&line, &rights)).await?;
        for (who, output) in [("init", init), ("exec", exec)] {
            let refused = output.matches("Operation not permitted").count();
            // busybox opens the output first, so a node is tried for both.
            ensure!(refused == 8 && output.ends_with("3\nover\n"), "{who}: {refused} refused: {output}");
        }
        Ok(())
    })
}

/// A container watches for processes that are not its own program while 40 execs come in: it never sees the agent's file,
/// descriptors or root.
fn cve_2016_9962_a_process_on_its_way_in_cannot_be_seen(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        // Nothing but the shell's own words: it looks as often as it can.
        let spy = "echo ready; while [ ! -e /tmp/stop ]; do for p in /proc/[0-9]*; do \
            [ -e $p/exe ] && ! [ $p/exe -ef /bin/busybox ] && echo file $p; \
            [ -d $p/root/ ] && ! [ $p/root/ -ef / ] && echo root $p; \
            [ -d $p/cwd/ ] && ! [ $p/cwd/ -ef / ] && echo cwd $p; \
            for fd in $p/fd/*; do [ -d $fd/ ] && echo directory $fd; done; \
            done; done; echo end";
        let mut spec = agent.spec(&["sh", "-c", spy]);
        spec.Mounts.push(mount("/tmp", "tmpfs", "tmpfs", &["mode=1777"]));
        grant(spec.Process.mut_or_insert_default(), &["CAP_DAC_OVERRIDE", "CAP_KILL"]);
        agent.run_spec("c1", spec).await?;
        ensure!(agent.read("c1", "").await? == b"ready\n");
        for n in 0..40 {
            let id = format!("e{n}");
            agent.exec("c1", &id, process(&["true"])).await?;
            ensure!(agent.wait("c1", &id).await? == 0);
        }
        agent.line("c1", "stop", "touch /tmp/stop").await?;
        let seen = agent.stdout("c1", "").await?;
        ensure!(seen == "end\n", "{seen}");
        Ok(())
    })
}

fn cve_2019_19921_links_in_the_place_of_kernel_file_systems_are_refused(
    scratch: &Scratch,
) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        for (name, mounts) in [("proc", "proc"), ("sys", "sysfs")] {
            let rootfs = agent.another_rootfs(name)?;
            let host = agent.host_share().join(name);
            std::fs::remove_dir(host.join(name))?;
            std::fs::create_dir_all(host.join("evil"))?;
            std::os::unix::fs::symlink("evil", host.join(name))?;
            let mut spec = agent.spec(&["true"]);
            spec.Root.mut_or_insert_default().Path = rootfs;
            if name == "sys" {
                spec.Mounts.push(mount("/sys", mounts, mounts, &["ro"]));
            }
            let error =
                agent.create(name, spec).await.err().with_context(|| format!("/{name} was followed"))?;
            ensure!(message(&error).contains(name), "{error}");
        }
        // A link in the place of /dev stays within the root.
        let rootfs = agent.another_rootfs("dev")?;
        let host = agent.host_share().join("dev");
        std::fs::remove_dir(host.join("dev"))?;
        std::os::unix::fs::symlink("/../../../../tmp", host.join("dev"))?;
        let mut spec = agent.spec(&["sleep", "1000"]);
        spec.Root.mut_or_insert_default().Path = rootfs;
        if agent.run_spec("dev", spec).await.is_ok() {
            let output = agent.line("dev", "e1", "ls /tmp/null && ls -d /tmp/pts").await?;
            ensure!(output.contains("/tmp/null"), "{output}");
        }
        agent.eye().await?;
        let mounts = agent.line("eye", "e1", "cat /guest/proc/1/mountinfo").await?;
        ensure!(!mounts.contains("evil"), "{mounts}");
        Ok(())
    })
}

/// Kata's defect 3796ca53dc: an exec joined the namespaces its init was in by then, and believed the container's own
/// `cap_last_cap`.
fn exec_joins_the_container_and_not_where_its_init_went(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        let elsewhere = "readlink /proc/self/ns/mnt /proc/self/ns/uts /proc/self/ns/ipc; exec unshare -m -u -i sh -c \
            'hostname elsewhere; mount -t tmpfs tmpfs /tmp; echo trap > /tmp/trap; echo moved; exec sleep 1000'";
        let mut spec = agent.spec(&["sh", "-c", elsewhere]);
        let rights = ["CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"];
        grant(spec.Process.mut_or_insert_default(), &rights);
        agent.run_spec("c1", spec).await?;
        let mut original = String::new();
        while !original.contains("moved\n") {
            original += &String::from_utf8_lossy(&agent.read("c1", "").await?);
        }
        let line = "readlink /proc/self/ns/mnt /proc/self/ns/uts /proc/self/ns/ipc; ls /tmp/trap; hostname";
        let (now, _) = agent.output("c1", "e1", with(line, &rights)).await?;
        let namespaces = original.trim_end_matches("moved\n");
        ensure!(now.starts_with(namespaces) && now.contains("No such file"), "{original}\n{now}");
        ensure!(now.ends_with("pod\n"), "{now}");

        // A lie about the kernel's last capability must not leave any behind.
        let lie = "mount -o remount,rw /proc/sys 2>/dev/null; echo 0 > /tmp/zero; \
            mount --bind /tmp/zero /proc/sys/kernel/cap_last_cap; cat /proc/sys/kernel/cap_last_cap";
        let (told, code) = agent.output("c1", "lie", with(lie, &rights)).await?;
        ensure!(code == 0 && told.ends_with("0\n"), "{told}");
        capabilities_are(agent, &["CAP_KILL"], "0000000000000020").await?;
        capabilities_are(agent, &[], "0000000000000000").await
    })
}

async fn capabilities_are(agent: &Agent, granted: &[&str], mask: &str) -> anyhow::Result<()> {
    let id = format!("caps{}", granted.len());
    let (status, _) = agent.output("c1", &id, with("grep Cap /proc/self/status", granted)).await?;
    for line in status.lines() {
        let (set, value) = line.split_once(":\t").context("a line of status")?;
        let wanted = if matches!(set, "CapInh" | "CapAmb") { "0000000000000000" } else { mask };
        ensure!(value == wanted, "{set} is {value}, granted {granted:?}: {status}");
    }
    Ok(())
}
