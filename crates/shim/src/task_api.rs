//! containerd's Task service, thin over the pod.
//!
//! The server drops a method's future when its caller goes away. So whatever changes something runs as a task of its own,
//! and goes to its end in any case; only waiting may be dropped.

use std::{sync::Arc, time::Duration};

use bulkhead_protocol::status::Kind;
use bulkhead_sandbox::Error;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::{TaskPaused, TaskResumed},
    shim_async,
};
use protobuf::{MessageField, well_known_types::any::Any};
use serde::de::DeserializeOwned;
use tokio::time;
use ttrpc::r#async::TtrpcContext;

use crate::{
    args::is_identifier,
    error::status,
    events::timestamp,
    metrics,
    pod::Pod,
    process::{Phase, Streams, exit_status},
};

/// The bound on the last events, within containerd's patience (3 s) for a Shutdown.
const FAREWELL: Duration = Duration::from_secs(2);

/// The service of one server.
#[derive(Clone, Debug)]
pub(crate) struct TaskService {
    pod: Arc<Pod>,
    cgroups: metrics::Version,
}

impl TaskService {
    /// A service for a pod.
    pub(crate) fn new(pod: Arc<Pod>) -> TaskService {
        TaskService { pod, cgroups: metrics::Version::of_host() }
    }
}

/// Runs a change to its end, whether or not its caller waits for it.
async fn detached<T: Send + 'static>(
    name: &'static str,
    change: impl Future<Output = ttrpc::Result<T>> + Send + 'static,
) -> ttrpc::Result<T> {
    let task = tokio::spawn(async move {
        let outcome = change.await;
        if let Err(error) = &outcome {
            tracing::warn!(rpc = name, error = crate::error::text(error), "failed");
        }
        outcome
    });
    match task.await {
        Ok(outcome) => outcome,
        Err(error) => Err(Kind::Internal.status(format!("{name} did not end: {error}"))),
    }
}

/// The JSON that containerd wraps in an `Any`.
fn json<T: DeserializeOwned>(what: &str, any: Option<&Any>) -> Result<T, Error> {
    let any = any.filter(|any| !any.type_url.is_empty());
    let any = any.ok_or_else(|| Error::Invalid(format!("the request carries no {what}")))?;
    serde_json::from_slice(&any.value)
        .map_err(|error| Error::Invalid(format!("{what} {}: {error}", any.type_url)))
}

#[async_trait::async_trait]
impl shim_async::Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let pod = self.pod.clone();
        detached("Create", async move {
            let task = pod.create(request).await.map_err(status)?;
            tracing::info!(id = task.id(), pid = task.pid(), "container created");
            Ok(CreateTaskResponse { pid: task.pid(), ..Default::default() })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let pod = self.pod.clone();
        detached("Start", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            task.start(&request.exec_id).await.map_err(status)?;
            Ok(StartResponse { pid: task.pid(), ..Default::default() })
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        if !is_identifier(&request.exec_id) {
            return Err(status(Error::Invalid(format!(
                "exec id {:?} is not a valid identifier",
                request.exec_id
            ))));
        }
        let task = self.pod.task(&request.id).await.map_err(status)?;
        let mut process: oci_spec::runtime::Process =
            json("process", request.spec.as_ref()).map_err(status)?;
        process.set_terminal(Some(request.terminal));
        let streams = Streams {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        task.add_exec(&request.exec_id, process, streams).map_err(status)?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let task = self.pod.task(&request.id).await.map_err(status)?;
        let process = task.process(&request.exec_id).map_err(status)?;
        let streams = process.streams.clone();
        let mut response = StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: task.container().bundle().display().to_string(),
            pid: task.pid(),
            stdin: streams.stdin,
            stdout: streams.stdout,
            stderr: streams.stderr,
            terminal: streams.terminal,
            ..Default::default()
        };
        let state = match process.phase() {
            Phase::Created | Phase::Starting => Status::CREATED,
            Phase::Started if task.is_paused(process.exec_id()) => Status::PAUSED,
            Phase::Started => Status::RUNNING,
            Phase::Exited(exit) => {
                response.exit_status = exit_status(exit);
                response.exited_at = MessageField::some(timestamp(exit.at));
                Status::STOPPED
            }
        };
        response.status = state.into();
        Ok(response)
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached("Kill", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            task.kill(&request.exec_id, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let task = self.pod.task(&request.id).await.map_err(status)?;
        let process = task.process(&request.exec_id).map_err(status)?;
        // A wait may last as long as the pod: it must not keep the pod's parts.
        drop(task);
        let gone = || Kind::Unavailable.status(format!("the pod of container {} is gone", request.id));
        let exit = process.wait().await.ok_or_else(gone)?;
        Ok(WaitResponse {
            exit_status: exit_status(exit),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> ttrpc::Result<DeleteResponse> {
        let pod = self.pod.clone();
        detached("Delete", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            let exit = if request.exec_id.is_empty() {
                pod.delete(&task).await.map_err(status)?
            } else {
                task.delete_exec(&request.exec_id).await.map_err(status)?
            };
            Ok(DeleteResponse {
                pid: task.pid(),
                exit_status: exit_status(exit),
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            })
        })
        .await
    }

    /// One entry, the VMM: the guest's processes have no pids here. A containerd that restarts takes an empty list for a
    /// shim without a task.
    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let task = self.pod.task(&request.id).await.map_err(status)?;
        let process = ProcessInfo { pid: task.pid(), ..Default::default() };
        Ok(PidsResponse { processes: vec![process], ..Default::default() })
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached("CloseIO", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            if request.stdin {
                task.container().close_stdin(&request.exec_id).await.map_err(status)?;
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached("ResizePty", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            task.container().resize(&request.exec_id, request.height, request.width).await.map_err(status)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached("Pause", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            task.container().pause().await.map_err(status)?;
            pod.events().publish(&TaskPaused { container_id: request.id, ..Default::default() });
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached("Resume", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            task.container().resume().await.map_err(status)?;
            pod.events().publish(&TaskResumed { container_id: request.id, ..Default::default() });
            Ok(Empty::new())
        })
        .await
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let pod = self.pod.clone();
        detached("Update", async move {
            let task = pod.task(&request.id).await.map_err(status)?;
            let resources = json("resources", request.resources.as_ref()).map_err(status)?;
            task.container().update(&resources).await.map_err(status)?;
            Ok(Empty::new())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let task = self.pod.task(&request.id).await.map_err(status)?;
        let stats = task.container().stats().await.map_err(status)?;
        let stats = metrics::metrics(&stats, self.cgroups).map_err(|error| {
            Kind::Internal.status(format!("metrics of container {}: {error}", request.id))
        })?;
        Ok(StatsResponse { stats: MessageField::some(stats), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> ttrpc::Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.pod.pid(&request.id),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> ttrpc::Result<Empty> {
        Err(status(Error::Unsupported(format!("checkpoint of container {}, which runs in a VM", request.id))))
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        if self.pod.shutdown(&request.id, request.now) {
            tracing::info!(id = request.id, "shutting down");
            self.pod.retire();
            // Who hears the answer has heard every event: nobody listens to this server after that.
            if time::timeout(FAREWELL, self.pod.events().flush()).await.is_err() {
                tracing::warn!(id = request.id, "events were not delivered in time");
            }
            self.pod.release();
        }
        Ok(Empty::new())
    }
}
