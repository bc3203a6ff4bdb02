//! The events of tasks: built where they happen, put into one queue in that order, sent by one task (`forward.rs`).
//!
//! Queueing never waits, so that a state can change and its event be queued in one step.

use std::time::SystemTime;

use containerd_shim_protos::{events::task as message, shim::event::Envelope};
use protobuf::{Message, MessageField, well_known_types::any::Any, well_known_types::timestamp::Timestamp};
use tokio::sync::{mpsc, oneshot};

/// How many events may wait for containerd. They are only made by what containerd asks for, so that a full queue means
/// that containerd hangs; what comes then is lost, and the log says so.
const QUEUE: usize = 8192;

/// An event and its topic.
pub(crate) trait Event: Message {
    /// containerd's topic for it.
    const TOPIC: &'static str;
}

macro_rules! topics {
    ($($message:ident = $topic:literal,)*) => { $(impl Event for message::$message { const TOPIC: &'static str = $topic; })* };
}

topics! {
    TaskCreate = "/tasks/create",
    TaskStart = "/tasks/start",
    TaskExit = "/tasks/exit",
    TaskDelete = "/tasks/delete",
    TaskExecAdded = "/tasks/exec-added",
    TaskExecStarted = "/tasks/exec-started",
    TaskPaused = "/tasks/paused",
    TaskResumed = "/tasks/resumed",
    TaskOOM = "/tasks/oom",
}

/// What travels in the queue.
#[derive(Debug)]
pub(crate) enum Item {
    /// An event.
    Event(Box<Envelope>),
    /// Everything before it is to be sent, then this is to be told.
    Flush(oneshot::Sender<()>),
}

/// The entrance of the queue.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    namespace: String,
    queue: mpsc::Sender<Item>,
}

impl Events {
    /// A queue for the events of a namespace.
    pub(crate) fn queue(namespace: &str) -> (Events, mpsc::Receiver<Item>) {
        let (queue, items) = mpsc::channel(QUEUE);
        (Events { namespace: namespace.to_owned(), queue }, items)
    }

    /// Queues an event, stamped with the present time.
    pub(crate) fn publish<E: Event>(&self, event: &E) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => return tracing::error!(topic = E::TOPIC, %error, "event could not be encoded"),
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.namespace.clone(),
            topic: E::TOPIC.to_owned(),
            // containerd registers its types under their bare names, without a host.
            event: MessageField::some(Any {
                type_url: format!("containerd.events.{}", E::NAME),
                value,
                ..Default::default()
            }),
            ..Default::default()
        };
        if let Err(error) = self.queue.try_send(Item::Event(Box::new(envelope))) {
            tracing::error!(topic = E::TOPIC, %error, "event lost");
        }
    }

    /// Resolves when every event queued so far was sent or given up.
    pub(crate) async fn flush(&self) {
        let (done, flushed) = oneshot::channel();
        if self.queue.send(Item::Flush(done)).await.is_ok() {
            let _ = flushed.await;
        }
    }
}

/// A time as containerd's messages have it.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The topics in the queue, each with the ids in its event.
    pub(crate) fn drain(items: &mut mpsc::Receiver<Item>) -> Vec<String> {
        let mut seen = Vec::new();
        while let Ok(item) = items.try_recv() {
            if let Item::Event(envelope) = item {
                seen.push(envelope.topic);
            }
        }
        seen
    }

    #[test]
    fn an_envelope_is_complete() {
        let (events, mut items) = Events::queue("k8s.io");
        events.publish(&message::TaskExit { container_id: "c".into(), exit_status: 3, ..Default::default() });
        let Ok(Item::Event(envelope)) = items.try_recv() else { panic!("nothing was queued") };
        assert_eq!((envelope.namespace.as_str(), envelope.topic.as_str()), ("k8s.io", "/tasks/exit"));
        assert!(envelope.timestamp.seconds > 1_600_000_000);
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
        let exit = message::TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
        assert_eq!((exit.container_id.as_str(), exit.exit_status), ("c", 3));
    }

    #[test]
    fn a_full_queue_never_blocks() {
        let (events, mut items) = Events::queue("n");
        for _ in 0..=QUEUE {
            events.publish(&message::TaskPaused::default());
        }
        assert_eq!(drain(&mut items).len(), QUEUE);
    }
}
