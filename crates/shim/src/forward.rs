//! Sends the queued events to containerd, one after the other, over one connection that is made when it is needed.
//!
//! An event is sent again only when no answer can have come: containerd could not be reached, or the connection broke,
//! which means that it restarts and that its subscribers are gone. An answer that is late or negative settles the event,
//! so that none is seen twice.

use std::time::Duration;

use containerd_shim_protos::{
    api::ForwardRequest,
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
};
use protobuf::MessageField;
use tokio::{net::UnixStream, sync::mpsc, time};

use crate::{error, events::Item};

/// The bound on one attempt.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Pauses before further attempts: containerd's restart fits in.
const RETRIES: [Duration; 5] = [
    Duration::from_millis(100),
    Duration::from_millis(400),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
];

/// containerd's end.
pub(crate) struct Forwarder {
    /// Path of its ttrpc socket.
    path: String,
    client: Option<EventsClient>,
}

enum Failure {
    /// It cannot have arrived.
    Lost(String),
    /// It may have.
    Settled(String),
}

impl Forwarder {
    /// For `$TTRPC_ADDRESS`, a path with or without `unix://`; without one (CRI-O) events are only logged.
    pub(crate) fn new(address: &str) -> Forwarder {
        Forwarder { path: address.strip_prefix("unix://").unwrap_or(address).to_owned(), client: None }
    }

    /// Serves the queue until its last entrance is gone.
    pub(crate) async fn run(mut self, mut items: mpsc::Receiver<Item>) {
        while let Some(item) = items.recv().await {
            match item {
                Item::Event(envelope) => self.deliver(*envelope).await,
                Item::Flush(done) => drop(done.send(())),
            }
        }
    }

    async fn deliver(&mut self, envelope: Envelope) {
        let topic = envelope.topic.clone();
        tracing::debug!(topic, "event");
        if self.path.is_empty() {
            return;
        }
        let request = ForwardRequest { envelope: MessageField::some(envelope), ..Default::default() };
        let mut retries = RETRIES.iter();
        loop {
            let reason = match self.attempt(&request).await {
                Ok(()) => return,
                Err(Failure::Settled(reason)) => {
                    return tracing::warn!(topic, reason, "event not acknowledged");
                }
                Err(Failure::Lost(reason)) => reason,
            };
            self.client = None;
            match retries.next() {
                Some(pause) => time::sleep(*pause).await,
                None => return tracing::error!(topic, reason, "event lost"),
            }
        }
    }

    async fn attempt(&mut self, request: &ForwardRequest) -> Result<(), Failure> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let stream = time::timeout(ATTEMPT, UnixStream::connect(&self.path))
                    .await
                    .map_err(|_| {
                        Failure::Lost(format!("connect {}: no answer within {ATTEMPT:?}", self.path))
                    })?
                    .map_err(|error| Failure::Lost(format!("connect {}: {error}", self.path)))?;
                self.client.insert(EventsClient::new(Client::new(stream.into())))
            }
        };
        let mut context = ttrpc::context::with_duration(ATTEMPT);
        context.add("containerd-namespace-ttrpc".to_owned(), request.envelope.namespace.clone());
        match client.forward(context, request).await {
            Ok(_) => Ok(()),
            Err(
                error @ (ttrpc::Error::RemoteClosed
                | ttrpc::Error::LocalClosed
                | ttrpc::Error::Eof
                | ttrpc::Error::Socket(_)),
            ) => Err(Failure::Lost(error::text(&error))),
            Err(error) => Err(Failure::Settled(error::text(&error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use containerd_shim_protos::{
        events::task::{TaskExit, TaskStart},
        shim_async::{Events as EventsService, create_events},
    };
    use ttrpc::r#async::{Server, TtrpcContext};

    use super::*;
    use crate::events::Events;

    #[derive(Default)]
    struct Containerd(Mutex<Vec<String>>);

    #[async_trait::async_trait]
    impl EventsService for Containerd {
        async fn forward(
            &self,
            _: &TtrpcContext,
            request: ForwardRequest,
        ) -> ttrpc::Result<containerd_shim_protos::api::Empty> {
            self.0.lock().unwrap().push(request.envelope.topic.clone());
            Ok(Default::default())
        }
    }

    async fn serve(containerd: &Arc<Containerd>, address: &str) -> Server {
        let mut server =
            Server::new().bind(address).unwrap().register_service(create_events(containerd.clone()));
        server.start().await.unwrap();
        server
    }

    #[tokio::test]
    async fn events_arrive_in_order_and_survive_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("containerd.sock.ttrpc");
        let address = format!("unix://{}", path.display());
        let containerd = Arc::new(Containerd::default());
        let mut server = serve(&containerd, &address).await;

        let (events, items) = Events::queue("n");
        tokio::spawn(Forwarder::new(&address).run(items));
        events.publish(&TaskStart::default());
        events.publish(&TaskExit::default());
        events.flush().await;
        assert_eq!(*containerd.0.lock().unwrap(), ["/tasks/start", "/tasks/exit"]);

        server.shutdown().await.unwrap();
        drop(server);
        std::fs::remove_file(&path).unwrap();
        events.publish(&TaskStart::default());
        let _server = serve(&containerd, &address).await;
        events.publish(&TaskExit::default());
        events.flush().await;
        assert_eq!(containerd.0.lock().unwrap()[2..], ["/tasks/start", "/tasks/exit"]);
    }
}
