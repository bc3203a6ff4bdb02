//! What cases ask of an agent most often, in a line each.

use std::{fmt::Debug, time::Duration};

use anyhow::{bail, ensure};
use bulkhead_protocol::{
    agent::*,
    health::CheckRequest,
    oci, ports,
    protobuf::MessageField,
    status::{Kind, message},
};
use ttrpc::context::{Context, with_duration};

use super::{Agent, mount, process, spec};

/// Nothing in these tests takes this long; a hang becomes a failure.
const PATIENCE: Duration = Duration::from_secs(60);

/// The deadline of every call.
pub fn context() -> Context {
    with_duration(PATIENCE)
}

/// Asserts what kind of error a call came to; its text.
pub fn failed<T: Debug>(result: ttrpc::Result<T>, kind: Kind) -> anyhow::Result<String> {
    match result {
        Ok(answer) => bail!("{kind:?} expected, but it succeeded: {answer:?}"),
        Err(error) => {
            ensure!(Kind::of_error(&error) == kind, "{kind:?} expected: {error}");
            Ok(message(&error))
        }
    }
}

impl Agent {
    /// The health check.
    pub async fn check(&self) -> ttrpc::Result<()> {
        self.health.check(context(), &CheckRequest::new()).await.map(drop)
    }

    /// CreateSandbox as the hosts send it: the share, and shared memory of 64 MiB.
    pub async fn pod(&self) -> ttrpc::Result<()> {
        self.client.create_sandbox(context(), &self.pod_request()).await.map(drop)
    }

    /// The request of [`Agent::pod`], to be changed.
    pub fn pod_request(&self) -> CreateSandboxRequest {
        let shm = Storage {
            driver: "ephemeral".into(),
            source: "shm".into(),
            fstype: "tmpfs".into(),
            options: ["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"].map(str::to_owned).to_vec(),
            mount_point: ports::GUEST_SHM.into(),
            ..Default::default()
        };
        let share = Storage {
            driver: "virtio-fs".into(),
            source: ports::SHARE_TAG.into(),
            fstype: "virtiofs".into(),
            mount_point: ports::GUEST_SHARE.into(),
            ..Default::default()
        };
        let storages = if self.is_in_vm() { vec![share, shm] } else { vec![shm] };
        CreateSandboxRequest {
            hostname: "pod".into(),
            sandbox_id: "pod".into(),
            storages,
            ..Default::default()
        }
    }

    /// A complete container configuration that runs a command in [`Agent::rootfs`].
    pub fn spec(&self, command: &[&str]) -> oci::Spec {
        spec(&self.rootfs(), command)
    }

    /// Runs a container named `eye`, through which a test sees the guest itself: `/guest/proc` and `/guest/cgroup` (as the
    /// guest sees its cgroups, not as a container does).
    pub async fn eye(&self) -> ttrpc::Result<()> {
        let mut spec = self.spec(&["sleep", "100000"]);
        spec.Mounts.push(mount("/guest/proc", "bind", "/proc", &["rbind"]));
        spec.Mounts.push(mount("/guest/cgroup", "bind", "/sys/fs/cgroup", &["rbind"]));
        spec.Linux.mut_or_insert_default().Namespaces.push(oci::LinuxNamespace {
            Type: "cgroup".into(),
            Path: "/proc/1/ns/cgroup".into(),
            ..Default::default()
        });
        self.run_spec("eye", spec).await
    }

    /// CreateContainer.
    pub async fn create(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        let request = CreateContainerRequest {
            container_id: id.into(),
            OCI: MessageField::some(spec),
            ..Default::default()
        };
        self.client.create_container(context(), &request).await.map(drop)
    }

    /// StartContainer.
    pub async fn start_container(&self, id: &str) -> ttrpc::Result<()> {
        let request = StartContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.start_container(context(), &request).await.map(drop)
    }

    /// Creates and starts a container of [`Agent::spec`].
    pub async fn run(&self, id: &str, command: &[&str]) -> ttrpc::Result<()> {
        self.run_spec(id, self.spec(command)).await
    }

    /// Creates and starts a container.
    pub async fn run_spec(&self, id: &str, spec: oci::Spec) -> ttrpc::Result<()> {
        self.create(id, spec).await?;
        self.start_container(id).await
    }

    /// ExecProcess.
    pub async fn exec(&self, id: &str, exec_id: &str, process: oci::Process) -> ttrpc::Result<()> {
        let request = ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: MessageField::some(process),
            ..Default::default()
        };
        self.client.exec_process(context(), &request).await.map(drop)
    }

    /// SignalProcess.
    pub async fn signal(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<()> {
        let request = SignalProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            signal,
            ..Default::default()
        };
        self.client.signal_process(context(), &request).await.map(drop)
    }

    /// WaitProcess: the exit code.
    pub async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<i32> {
        let request =
            WaitProcessRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.client.wait_process(context(), &request).await.map(|response| response.status)
    }

    /// RemoveContainer.
    pub async fn remove(&self, id: &str) -> ttrpc::Result<()> {
        let request = RemoveContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.remove_container(context(), &request).await.map(drop)
    }

    /// StatsContainer.
    pub async fn stats(&self, id: &str) -> ttrpc::Result<StatsContainerResponse> {
        let request = StatsContainerRequest { container_id: id.into(), ..Default::default() };
        self.client.stats_container(context(), &request).await
    }

    /// WriteStdin: the bytes taken.
    pub async fn write(&self, id: &str, exec_id: &str, data: &[u8]) -> ttrpc::Result<u32> {
        let request = WriteStreamRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            data: data.to_vec(),
            ..Default::default()
        };
        self.client.write_stdin(context(), &request).await.map(|response| response.len)
    }

    /// CloseStdin.
    pub async fn close(&self, id: &str, exec_id: &str) -> ttrpc::Result<()> {
        let request =
            CloseStdinRequest { container_id: id.into(), exec_id: exec_id.into(), ..Default::default() };
        self.client.close_stdin(context(), &request).await.map(drop)
    }

    /// ReadStdout, once.
    pub async fn read(&self, id: &str, exec_id: &str) -> ttrpc::Result<Vec<u8>> {
        self.client.read_stdout(context(), &read_request(id, exec_id)).await.map(|response| response.data)
    }

    /// Standard output to its end.
    pub async fn stdout(&self, id: &str, exec_id: &str) -> ttrpc::Result<String> {
        let mut all = Vec::new();
        loop {
            let data = self.read(id, exec_id).await?;
            if data.is_empty() {
                return Ok(String::from_utf8_lossy(&all).into_owned());
            }
            all.extend(data);
        }
    }

    /// Standard error to its end.
    pub async fn stderr(&self, id: &str, exec_id: &str) -> ttrpc::Result<String> {
        let mut all = Vec::new();
        loop {
            let data = self.client.read_stderr(context(), &read_request(id, exec_id)).await?.data;
            if data.is_empty() {
                return Ok(String::from_utf8_lossy(&all).into_owned());
            }
            all.extend(data);
        }
    }

    /// Runs a process in a container to its end: its output and exit code.
    pub async fn output(
        &self,
        id: &str,
        exec_id: &str,
        process: oci::Process,
    ) -> ttrpc::Result<(String, i32)> {
        self.exec(id, exec_id, process).await?;
        Ok((self.stdout(id, exec_id).await?, self.wait(id, exec_id).await?))
    }

    /// Runs a shell line in a container to its end: its output (both kinds) and exit code.
    pub async fn shell(&self, id: &str, exec_id: &str, line: &str) -> ttrpc::Result<(String, i32)> {
        self.output(id, exec_id, process(&["sh", "-c", &format!("exec 2>&1; {line}")])).await
    }

    /// Runs a shell line in a container, which must end with 0; its output.
    pub async fn line(&self, id: &str, exec_id: &str, line: &str) -> anyhow::Result<String> {
        let (output, code) = self.shell(id, exec_id, line).await?;
        ensure!(code == 0, "{line}: {code}: {output}");
        Ok(output)
    }
}

fn read_request(id: &str, exec_id: &str) -> ReadStreamRequest {
    ReadStreamRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        len: 32 << 10,
        ..Default::default()
    }
}
