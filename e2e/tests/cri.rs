//! A pod through containerd's CRI, as a kubelet makes it: two containers in one VM.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use bulkhead_e2e::{Containerd, Cri, Flavour, Scratch, cases, run};

fn main() -> ExitCode {
    run(cases![a_pod_on_1_6, a_pod_on_1_7, a_pod_on_2, a_container_is_stopped_and_replaced])
}

fn a_pod_on_1_6(scratch: &Scratch) -> anyhow::Result<()> {
    a_pod(scratch, Flavour::installed()?)
}

fn a_pod_on_1_7(scratch: &Scratch) -> anyhow::Result<()> {
    a_pod(scratch, Flavour::unpacked("1.7")?)
}

fn a_pod_on_2(scratch: &Scratch) -> anyhow::Result<()> {
    a_pod(scratch, Flavour::unpacked("2.")?)
}

fn a_pod(scratch: &Scratch, flavour: Flavour) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, flavour)?;
    let cri = Cri::connect(&containerd, scratch)?;
    let pod = cri.pod("web");
    let id = cri.run_pod(&pod).with_context(|| containerd.log())?;
    let one = cri.run_container(&id, &pod, "one", &["/bin/sh", "-c", "echo from one; exec sleep 1000"])?;
    let two = cri.run_container(
        &id,
        &pod,
        "two",
        &["/bin/sh", "-c", "echo from two; echo bad >&2; exec sleep 1000"],
    )?;

    // One VM: both share its kernel and the pod's memory, and each has its own processes.
    cri.exec_sync(&one, &["/bin/sh", "-c", "echo shared > /dev/shm/word"])?;
    let seen = cri.exec_sync(&two, &["cat", "/dev/shm/word"])?;
    ensure!(seen.stdout == b"shared\n", "{seen:?}");
    let boot = |container: &str| cri.exec_sync(container, &["cat", "/proc/sys/kernel/random/boot_id"]);
    ensure!(boot(&one)?.stdout == boot(&two)?.stdout, "two VMs");

    let exec = cri.exec_sync(&one, &["/bin/sh", "-c", "echo out; echo err >&2; exit 9"])?;
    ensure!((&exec.stdout[..], &exec.stderr[..], exec.exit_code) == (b"out\n", b"err\n", 9), "{exec:?}");
    let streamed = cri.exec_stream(
        &two,
        &["/bin/sh", "-c", "read line; echo got $line; echo e >&2; exit 3"],
        false,
        b"word\n",
    )?;
    ensure!(streamed.stdout == b"got word\n" && streamed.stderr == b"e\n", "{streamed:?}");
    ensure!(streamed.status.contains('3') && streamed.status.contains("Failure"), "{streamed:?}");
    let streamed =
        cri.exec_stream(&two, &["/bin/sh", "-c", "tty && read line && exit 0"], true, b"word\n")?;
    ensure!(streamed.status.contains("Success"), "{streamed:?}");

    ensure!(cri.log("one")?.contains("stdout F from one"), "{}", cri.log("one")?);
    ensure!(cri.log("two")?.contains("stderr F bad"), "{}", cri.log("two")?);
    let stats = cri.stats(&one)?;
    let memory = stats.memory.and_then(|memory| memory.working_set_bytes).map(|bytes| bytes.value);
    let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map(|time| time.value);
    ensure!(memory.is_some_and(|bytes| bytes > 0) && cpu.is_some_and(|time| time > 0), "{memory:?} {cpu:?}");

    cri.stop_container(&two, 0)?;
    ensure!(cri.status(&two)?.exit_code == 137, "{:?}", cri.status(&two)?);
    ensure!(cri.pod_ready(&id)?, "the pod ended with one of its containers");
    cri.remove_pod(&id)
}

fn a_container_is_stopped_and_replaced(scratch: &Scratch) -> anyhow::Result<()> {
    let containerd = Containerd::start(scratch, Flavour::installed()?)?;
    let cri = Cri::connect(&containerd, scratch)?;
    let pod = cri.pod("job");
    let id = cri.run_pod(&pod).with_context(|| containerd.log())?;
    let script = "trap 'echo bye; exit 12' TERM; echo up; while :; do sleep 1; done";
    let first = cri.run_container(&id, &pod, "first", &["/bin/sh", "-c", script])?;
    cri.exec_sync(&first, &["true"])?;
    cri.stop_container(&first, 30)?;
    ensure!(cri.status(&first)?.exit_code == 12, "{:?}", cri.status(&first)?);
    ensure!(cri.log("first")?.contains("stdout F bye"), "{}", cri.log("first")?);
    cri.remove_container(&first)?;
    let second = cri.run_container(&id, &pod, "second", &["sleep", "1000"])?;
    ensure!(cri.exec_sync(&second, &["true"])?.exit_code == 0, "the second container does not work");
    cri.remove_pod(&id)
}
