//! An agent in this process, for tests: it runs nothing, but keeps streams, an exit and a record of what it was asked.

use std::{
    collections::VecDeque,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use bulkhead_hypervisor::{Accel, Endpoint, VmExit};
use bulkhead_protocol::{
    Empty, agent as api,
    agent_ttrpc::{AgentService, create_agent_service},
    health::{CheckRequest, HealthCheckResponse},
    health_ttrpc::{Health, create_health},
    status::Kind,
};
use tokio::sync::{Notify, watch};
use ttrpc::r#async::{Server, TtrpcContext};

use crate::{agent::Agent, guest::Guest, process::lock};

/// One stream of the fake process.
#[derive(Default)]
pub(crate) struct Stream {
    held: Mutex<(VecDeque<u8>, bool)>,
    changed: Notify,
}

impl Stream {
    /// The process writes.
    pub(crate) fn write(&self, data: &[u8]) {
        lock(&self.held).0.extend(data);
        self.changed.notify_waiters();
    }

    /// The process, and whoever else has it, closes it.
    pub(crate) fn close(&self) {
        lock(&self.held).1 = true;
        self.changed.notify_waiters();
    }

    async fn read(&self, limit: usize) -> Vec<u8> {
        loop {
            let changed = self.changed.notified();
            {
                let mut held = lock(&self.held);
                if !held.0.is_empty() || held.1 {
                    let count = limit.min(held.0.len());
                    return held.0.drain(..count).collect();
                }
            }
            changed.await;
        }
    }
}

/// The fake: one process, whatever its ids.
#[derive(Default)]
pub(crate) struct FakeAgent {
    pub(crate) stdout: Stream,
    pub(crate) stderr: Stream,
    stdin: Mutex<Vec<u8>>,
    exit: watch::Sender<Option<i32>>,
    calls: Mutex<Vec<String>>,
    called: Notify,
    /// What ExecProcess answers.
    pub(crate) refusal: Mutex<Option<(Kind, String)>>,
    /// Sends more than it is asked for.
    pub(crate) excess: Mutex<bool>,
}

impl FakeAgent {
    /// The process ends, and its streams with it.
    pub(crate) fn end(&self, code: i32) {
        self.exit.send_replace(Some(code));
        self.stdout.close();
        self.stderr.close();
    }

    /// The process ends, but something else holds its streams.
    pub(crate) fn end_with_open_streams(&self, code: i32) {
        self.exit.send_replace(Some(code));
    }

    /// What the process has read.
    pub(crate) fn stdin(&self) -> Vec<u8> {
        lock(&self.stdin).clone()
    }

    /// What was asked so far.
    pub(crate) fn calls(&self) -> Vec<String> {
        lock(&self.calls).clone()
    }

    /// Resolves when something was asked.
    pub(crate) async fn called(&self, call: &str) {
        loop {
            let called = self.called.notified();
            if self.calls().iter().any(|known| known == call) {
                return;
            }
            called.await;
        }
    }

    fn record(&self, call: impl Into<String>) {
        lock(&self.calls).push(call.into());
        self.called.notify_waiters();
    }

    async fn read(&self, name: &str, stream: &Stream, limit: u32) -> ttrpc::Result<api::ReadStreamResponse> {
        let limit = usize::try_from(limit).unwrap();
        let excess = if *lock(&self.excess) { 1 } else { 0 };
        let data = stream.read(limit + excess).await;
        if data.is_empty() {
            self.record(format!("{name} end"));
        }
        Ok(api::ReadStreamResponse { data, ..Default::default() })
    }
}

#[async_trait]
impl AgentService for FakeAgent {
    async fn start_container(&self, _: &TtrpcContext, _: api::StartContainerRequest) -> ttrpc::Result<Empty> {
        self.record("StartContainer");
        Ok(Empty::new())
    }

    async fn exec_process(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> ttrpc::Result<Empty> {
        self.record(format!("ExecProcess {}", request.exec_id));
        match lock(&self.refusal).clone() {
            Some((kind, message)) => Err(kind.status(message)),
            None => Ok(Empty::new()),
        }
    }

    async fn wait_process(
        &self,
        _: &TtrpcContext,
        _: api::WaitProcessRequest,
    ) -> ttrpc::Result<api::WaitProcessResponse> {
        self.record("WaitProcess");
        let status = self.exit.subscribe().wait_for(Option::is_some).await.unwrap().unwrap();
        Ok(api::WaitProcessResponse { status, ..Default::default() })
    }

    async fn read_stdout(
        &self,
        _: &TtrpcContext,
        request: api::ReadStreamRequest,
    ) -> ttrpc::Result<api::ReadStreamResponse> {
        self.read("ReadStdout", &self.stdout, request.len).await
    }

    async fn read_stderr(
        &self,
        _: &TtrpcContext,
        request: api::ReadStreamRequest,
    ) -> ttrpc::Result<api::ReadStreamResponse> {
        self.read("ReadStderr", &self.stderr, request.len).await
    }

    async fn write_stdin(
        &self,
        _: &TtrpcContext,
        request: api::WriteStreamRequest,
    ) -> ttrpc::Result<api::WriteStreamResponse> {
        lock(&self.stdin).extend(&request.data);
        let len = u32::try_from(request.data.len()).unwrap();
        Ok(api::WriteStreamResponse { len, ..Default::default() })
    }

    async fn close_stdin(&self, _: &TtrpcContext, _: api::CloseStdinRequest) -> ttrpc::Result<Empty> {
        self.record("CloseStdin");
        Ok(Empty::new())
    }

    async fn tty_win_resize(&self, _: &TtrpcContext, size: api::TtyWinResizeRequest) -> ttrpc::Result<Empty> {
        self.record(format!("TtyWinResize {}x{}", size.row, size.column));
        Ok(Empty::new())
    }
}

struct Healthy;

#[async_trait]
impl Health for Healthy {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        Ok(HealthCheckResponse::new())
    }
}

/// A fake agent, and the host's view of it.
pub(crate) struct Bench {
    pub(crate) agent: Arc<FakeAgent>,
    pub(crate) guest: Arc<Guest>,
    pub(crate) directory: tempfile::TempDir,
    gone: watch::Sender<Option<VmExit>>,
    _server: Server,
}

impl Bench {
    /// Starts a server and connects to it.
    pub(crate) async fn new() -> Bench {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("agent.sock");
        let agent = Arc::new(FakeAgent::default());
        let mut server = Server::new()
            .bind(&format!("unix://{}", path.display()))
            .unwrap()
            .register_service(create_agent_service(agent.clone()))
            .register_service(create_health(Arc::new(Healthy)));
        server.start().await.unwrap();
        let endpoint = Endpoint::Unix { path };
        let client = Agent::connect(&endpoint, Accel::Kvm, Duration::from_secs(5)).await.unwrap();
        let (gone, news) = watch::channel(None);
        Bench { agent, guest: Arc::new(Guest::new(client, news)), directory, gone, _server: server }
    }

    /// A path for a file of the test.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The VM ends.
    pub(crate) fn lose_vm(&self) {
        let exit = VmExit { code: 9, at: SystemTime::UNIX_EPOCH, last_words: "Kernel panic".into() };
        self.gone.send_replace(Some(exit));
    }
}
