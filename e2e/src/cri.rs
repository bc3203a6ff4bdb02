//! A client of the Container Runtime Interface: what a kubelet asks of containerd.

use std::{future::Future, path::PathBuf, time::Duration};

use anyhow::{Context, bail};
use futures_util::{SinkExt, StreamExt};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    self, ContainerConfig, ContainerMetadata, ImageSpec, LinuxPodSandboxConfig, LinuxSandboxSecurityContext,
    NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    runtime_service_client::RuntimeServiceClient,
};
use tokio::{net::UnixStream, runtime::Runtime, time::timeout};
use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest, http::HeaderValue};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::{Containerd, Scratch};

/// A hang is a failure, after this long.
const BOUND: Duration = Duration::from_secs(180);
const PROTOCOL: &str = "v4.channel.k8s.io";

/// The sandbox configuration of a test pod.
pub type PodConfig = PodSandboxConfig;

/// A CRI connection.
pub struct Cri {
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
    logs: PathBuf,
    image: String,
}

/// What came over a streaming exec.
#[derive(Debug, Default)]
pub struct Streamed {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// The closing status, JSON: `{"status":"Success"}` or a failure with the exit code.
    pub status: String,
}

impl Cri {
    /// Connects to a containerd.
    pub fn connect(containerd: &Containerd, scratch: &Scratch) -> anyhow::Result<Cri> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let address = containerd.address();
        let connect = move |_: Uri| {
            let address = address.clone();
            async move { UnixStream::connect(address).await.map(TokioIo::new) }
        };
        let channel = runtime.block_on(async {
            Endpoint::try_from("http://containerd")?.connect_with_connector(tower::service_fn(connect)).await
        })?;
        let logs = scratch.path().join("pod-logs");
        std::fs::create_dir_all(&logs)?;
        let client = RuntimeServiceClient::new(channel).max_decoding_message_size(64 << 20);
        Ok(Cri { runtime, client, logs, image: containerd.image().to_owned() })
    }

    /// The configuration of a pod on the host's network (no CNI), with a log folder.
    pub fn pod(&self, name: &str) -> PodConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(NamespaceOption {
                        network: NamespaceMode::Node.into(),
                        pid: NamespaceMode::Container.into(),
                        ..NamespaceOption::default()
                    }),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// RunPodSandbox.
    pub fn run_pod(&self, pod: &PodConfig) -> anyhow::Result<String> {
        let mut client = self.client.clone();
        let request =
            v1::RunPodSandboxRequest { config: Some(pod.clone()), runtime_handler: "bulkhead".to_owned() };
        Ok(self.call("RunPodSandbox", async move { client.run_pod_sandbox(request).await })?.pod_sandbox_id)
    }

    /// CreateContainer and StartContainer.
    pub fn run_container(
        &self,
        pod_id: &str,
        pod: &PodConfig,
        name: &str,
        command: &[&str],
    ) -> anyhow::Result<String> {
        let config = ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
            image: Some(ImageSpec { image: self.image.clone(), ..ImageSpec::default() }),
            command: command.iter().map(|&arg| arg.to_owned()).collect(),
            log_path: format!("{name}.log"),
            ..ContainerConfig::default()
        };
        let mut client = self.client.clone();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod_id.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod.clone()),
        };
        let id =
            self.call("CreateContainer", async move { client.create_container(request).await })?.container_id;
        let mut client = self.client.clone();
        let request = v1::StartContainerRequest { container_id: id.clone() };
        self.call("StartContainer", async move { client.start_container(request).await })?;
        Ok(id)
    }

    /// ExecSync: output, errors and exit code.
    pub fn exec_sync(&self, container: &str, command: &[&str]) -> anyhow::Result<v1::ExecSyncResponse> {
        let mut client = self.client.clone();
        let request = v1::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&arg| arg.to_owned()).collect(),
            timeout: 60,
        };
        self.call("ExecSync", async move { client.exec_sync(request).await })
    }

    /// Exec: the streaming form of `kubectl exec -i`, with `input` as standard input.
    pub fn exec_stream(
        &self,
        container: &str,
        command: &[&str],
        tty: bool,
        input: &[u8],
    ) -> anyhow::Result<Streamed> {
        let mut client = self.client.clone();
        let request = v1::ExecRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&arg| arg.to_owned()).collect(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let url = self.call("Exec", async move { client.exec(request).await })?.url;
        self.bounded("the exec stream", stream(&url.replacen("http", "ws", 1), input))
    }

    /// The contents of a container's log file: lines of `<time> <stream> <P|F> <text>`.
    pub fn log(&self, name: &str) -> anyhow::Result<String> {
        let path = self.logs.join(format!("{name}.log"));
        std::fs::read_to_string(&path).with_context(|| path.display().to_string())
    }

    /// ContainerStats.
    pub fn stats(&self, container: &str) -> anyhow::Result<v1::ContainerStats> {
        let mut client = self.client.clone();
        let request = v1::ContainerStatsRequest { container_id: container.to_owned() };
        let response = self.call("ContainerStats", async move { client.container_stats(request).await })?;
        response.stats.context("no stats in the answer")
    }

    /// ContainerStatus.
    pub fn status(&self, container: &str) -> anyhow::Result<v1::ContainerStatus> {
        let mut client = self.client.clone();
        let request = v1::ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
        let response = self.call("ContainerStatus", async move { client.container_status(request).await })?;
        response.status.context("no status in the answer")
    }

    /// PodSandboxStatus: whether the pod is ready.
    pub fn pod_ready(&self, pod_id: &str) -> anyhow::Result<bool> {
        let mut client = self.client.clone();
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: pod_id.to_owned(), verbose: false };
        let response =
            self.call("PodSandboxStatus", async move { client.pod_sandbox_status(request).await })?;
        let status = response.status.context("no status in the answer")?;
        Ok(status.state == i32::from(v1::PodSandboxState::SandboxReady))
    }

    /// StopContainer with a grace period in seconds.
    pub fn stop_container(&self, container: &str, grace: i64) -> anyhow::Result<()> {
        let mut client = self.client.clone();
        let request = v1::StopContainerRequest { container_id: container.to_owned(), timeout: grace };
        self.call("StopContainer", async move { client.stop_container(request).await }).map(drop)
    }

    /// RemoveContainer.
    pub fn remove_container(&self, container: &str) -> anyhow::Result<()> {
        let mut client = self.client.clone();
        let request = v1::RemoveContainerRequest { container_id: container.to_owned() };
        self.call("RemoveContainer", async move { client.remove_container(request).await }).map(drop)
    }

    /// StopPodSandbox and RemovePodSandbox.
    pub fn remove_pod(&self, pod_id: &str) -> anyhow::Result<()> {
        let mut client = self.client.clone();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod_id.to_owned() };
        self.call("StopPodSandbox", async move { client.stop_pod_sandbox(request).await })?;
        let mut client = self.client.clone();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod_id.to_owned() };
        self.call("RemovePodSandbox", async move { client.remove_pod_sandbox(request).await }).map(drop)
    }

    fn call<T>(
        &self,
        what: &'static str,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> anyhow::Result<T> {
        self.bounded(what, async { call.await.map(tonic::Response::into_inner).map_err(anyhow::Error::from) })
    }

    fn bounded<T>(
        &self,
        what: &'static str,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        match self.runtime.block_on(async { timeout(BOUND, work).await }) {
            Ok(result) => result.context(what),
            Err(_) => bail!("{what} hangs: no answer within {BOUND:?}"),
        }
    }
}

/// Speaks the channel protocol: the first byte of a message names the stream, 0 to 4: in, out, err, status, size.
async fn stream(url: &str, input: &[u8]) -> anyhow::Result<Streamed> {
    let address = url.split('/').nth(2).context("no host in the URL")?.to_owned();
    let mut request = url.into_client_request()?;
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static(PROTOCOL));
    let tcp = tokio::net::TcpStream::connect(address).await?;
    let (socket, _) = tokio_tungstenite::client_async(request, tcp).await?;
    let (mut sink, mut source) = socket.split();
    if !input.is_empty() {
        let mut message = vec![0];
        message.extend_from_slice(input);
        sink.send(Message::Binary(message.into())).await?;
    }
    let mut streamed = Streamed::default();
    while let Some(message) = source.next().await {
        match message {
            Ok(Message::Binary(bytes)) => match bytes.split_first() {
                Some((1, rest)) => streamed.stdout.extend_from_slice(rest),
                Some((2, rest)) => streamed.stderr.extend_from_slice(rest),
                Some((3, rest)) => streamed.status.push_str(&String::from_utf8_lossy(rest)),
                _ => {}
            },
            Ok(Message::Close(_)) | Err(_) => break,
            Ok(_) => {}
        }
    }
    Ok(streamed)
}
