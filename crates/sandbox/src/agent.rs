//! The connection to the guest's agent: dialing, deadlines, and failures in the crate's own terms.
//!
//! ttrpc closes the whole connection when a request is cancelled while it is being written. Therefore every call runs in
//! a task of its own, and giving up on one only stops listening to it.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bulkhead_hypervisor::{Accel, Connection, Endpoint, Error as VmError};
use bulkhead_protocol::{
    agent_ttrpc::AgentServiceClient,
    health::CheckRequest,
    health_ttrpc::HealthClient,
    ports,
    status::{self, Kind},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
};
use ttrpc::{r#async::transport::Socket, context};

use crate::Error;

/// How long an answer may take, on hardware virtualization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// What the agent does by itself, in bounded time.
    Request,
    /// An answer wanted within this time, whatever the accelerator.
    Within(Duration),
    /// What lasts as long as a process, or as its pipes are full.
    Unbounded,
}

impl Patience {
    const REQUEST: Duration = Duration::from_secs(60);

    /// In time units of this machine; `None` is forever.
    pub(crate) fn bound(self, accel: Accel) -> Option<Duration> {
        match self {
            Patience::Request => Some(accel.scale(Patience::REQUEST)),
            Patience::Within(bound) => Some(bound),
            Patience::Unbounded => None,
        }
    }
}

/// The agent of one guest, reached through one connection that all calls share.
#[derive(Clone)]
pub(crate) struct Agent {
    client: AgentServiceClient,
    accel: Accel,
    broken: watch::Receiver<bool>,
}

impl Agent {
    /// Dials until the agent listens and answers, all within `bound`. Errors of the hypervisor are passed on, a silent
    /// agent is [`VmError::NotListening`].
    pub(crate) async fn connect(
        endpoint: &Endpoint,
        accel: Accel,
        bound: Duration,
    ) -> Result<Agent, VmError> {
        let deadline = Instant::now() + bound;
        let connection = endpoint.dial_within(ports::AGENT, bound).await?;
        let (agent, health) = Agent::over(connection, accel);
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let request = CheckRequest::new();
        match health.check(context::with_duration(left), &request).await {
            Ok(_) => Ok(agent),
            Err(error) => {
                tracing::debug!("the agent's health check: {error}");
                Err(VmError::NotListening { port: ports::AGENT })
            }
        }
    }

    /// The clients over an established connection.
    pub(crate) fn over(connection: Connection, accel: Accel) -> (Agent, HealthClient) {
        let (tripwire, broken) = Tripwire::new(connection);
        let client = ttrpc::r#async::Client::new(Socket::new(tripwire));
        (Agent { client: AgentServiceClient::new(client.clone()), accel, broken }, HealthClient::new(client))
    }

    /// What the guest runs under.
    pub(crate) fn accel(&self) -> Accel {
        self.accel
    }

    /// Resolves when the connection is gone, for whatever reason.
    pub(crate) fn broken(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut broken = self.broken.clone();
        async move {
            // A dropped sender means the same.
            let _ = broken.wait_for(|broken| *broken).await;
        }
    }

    /// One call. `operation` names the RPC in errors.
    pub(crate) async fn call<R, F>(
        &self,
        operation: &'static str,
        patience: Patience,
        rpc: impl FnOnce(AgentServiceClient, context::Context) -> F,
    ) -> Result<R, Error>
    where
        R: Send + 'static,
        F: Future<Output = ttrpc::Result<R>> + Send + 'static,
    {
        let bound = patience.bound(self.accel);
        let context = bound.map_or_else(context::Context::default, context::with_duration);
        let begun = Instant::now();
        let answer = tokio::spawn(rpc(self.client.clone(), context)).await;
        let error = match answer {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => error,
            Err(join) => ttrpc::Error::Others(join.to_string()),
        };
        let late = bound.filter(|bound| begun.elapsed() >= *bound);
        Err(match (&error, late) {
            (ttrpc::Error::RpcStatus(_), _) | (_, None) => {
                Error::Agent { operation, kind: Kind::of_error(&error), message: status::message(&error) }
            }
            (_, Some(bound)) => {
                let message = format!("the guest agent did not answer within {bound:?}");
                Error::Agent { operation, kind: Kind::DeadlineExceeded, message }
            }
        })
    }
}

/// A connection that tells when it ends.
struct Tripwire {
    connection: Connection,
    broken: watch::Sender<bool>,
}

impl Tripwire {
    fn new(connection: Connection) -> (Tripwire, watch::Receiver<bool>) {
        let (broken, receiver) = watch::channel(false);
        (Tripwire { connection, broken }, receiver)
    }
}

impl Drop for Tripwire {
    fn drop(&mut self) {
        self.broken.send_replace(true);
    }
}

impl AsyncRead for Tripwire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let room = buffer.remaining() > 0;
        let result = ready!(Pin::new(&mut self.connection).poll_read(cx, buffer));
        if result.is_err() || (room && buffer.filled().len() == before) {
            self.broken.send_replace(true);
        }
        Poll::Ready(result)
    }
}

impl AsyncWrite for Tripwire {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let result = ready!(Pin::new(&mut self.connection).poll_write(cx, data));
        if result.is_err() {
            self.broken.send_replace(true);
        }
        Poll::Ready(result)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}
