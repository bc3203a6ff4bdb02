//! A process as containerd sees it: its streams' names, its phase, and the events of its life, each exactly once.
//!
//! ```text
//! Created ──begin_start()──► Starting ──started()──► Started ──finish()──► Exited
//!    │                          └────start_failed()──► Exited (no exit event: nothing was started)
//!    └──finish(): killed before it was started───────► Exited
//! ```
//!
//! `finish` waits while a start is under way, and each step queues its event before it shows its new phase: so the exit
//! of a process that ends at once never overtakes its start, and whoever saw the exit (Wait, then Delete) comes after it.

use bulkhead_sandbox::{Error, Exit};
use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit, TaskStart};
use protobuf::MessageField;
use tokio::sync::watch;

use crate::events::{Events, timestamp};

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Known.
    Created,
    /// The guest was asked to start it.
    Starting,
    /// It was started.
    Started,
    /// It has ended, and everybody may know.
    Exited(Exit),
}

/// The names of a process' streams, as containerd gave them and wants to hear them again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Streams {
    /// Standard input.
    pub(crate) stdin: String,
    /// Standard output.
    pub(crate) stdout: String,
    /// Standard error.
    pub(crate) stderr: String,
    /// Whether they are a terminal.
    pub(crate) terminal: bool,
}

/// A process of a container: init (`exec_id` empty) or an exec.
#[derive(Debug)]
pub(crate) struct Process {
    container_id: String,
    exec_id: String,
    /// The VMM's pid stands for every process of the pod.
    pid: u32,
    /// Its streams.
    pub(crate) streams: Streams,
    phase: watch::Sender<Phase>,
    events: Events,
}

impl Process {
    /// A process that is known and not started.
    pub(crate) fn new(
        container_id: &str,
        exec_id: &str,
        pid: u32,
        streams: Streams,
        events: Events,
    ) -> Process {
        Process {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid,
            streams,
            phase: watch::Sender::new(Phase::Created),
            events,
        }
    }

    /// Its exec id; empty for init.
    pub(crate) fn exec_id(&self) -> &str {
        &self.exec_id
    }

    /// Where it is in its life.
    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Claims the right to start it, which is given once.
    pub(crate) fn begin_start(&self) -> Result<(), Error> {
        let mut found = Phase::Created;
        self.phase.send_if_modified(|phase| {
            found = *phase;
            if found == Phase::Created {
                *phase = Phase::Starting;
            }
            found == Phase::Created
        });
        let name = self.name();
        match found {
            Phase::Created => Ok(()),
            Phase::Starting | Phase::Started => Err(Error::WrongState(format!("{name} was started before"))),
            Phase::Exited(_) => Err(Error::WrongState(format!("{name} has ended and cannot be started"))),
        }
    }

    /// The guest has started it.
    pub(crate) fn started(&self) {
        self.phase.send_modify(|phase| {
            if self.exec_id.is_empty() {
                self.events.publish(&TaskStart {
                    container_id: self.container_id.clone(),
                    pid: self.pid,
                    ..Default::default()
                });
            } else {
                self.events.publish(&TaskExecStarted {
                    container_id: self.container_id.clone(),
                    exec_id: self.exec_id.clone(),
                    pid: self.pid,
                    ..Default::default()
                });
            }
            *phase = Phase::Started;
        });
    }

    /// The guest could not start it, or nobody will: whoever waits for it hears `exit`, and no event is published.
    pub(crate) fn abandon(&self, exit: Exit) {
        self.phase.send_if_modified(|phase| {
            let ends = matches!(phase, Phase::Created | Phase::Starting);
            if ends {
                *phase = Phase::Exited(exit);
            }
            ends
        });
    }

    /// It has ended. The first call publishes the exit; further ones change nothing.
    pub(crate) async fn finish(&self, exit: Exit) {
        let mut phases = self.phase.subscribe();
        loop {
            // The sender is ours: it cannot be gone.
            let _ = phases.wait_for(|phase| *phase != Phase::Starting).await;
            let mut starting = false;
            self.phase.send_if_modified(|phase| match phase {
                Phase::Starting => {
                    starting = true;
                    false
                }
                Phase::Exited(_) => false,
                Phase::Created | Phase::Started => {
                    self.publish_exit(exit);
                    *phase = Phase::Exited(exit);
                    true
                }
            });
            if !starting {
                return;
            }
        }
    }

    /// Resolves when it has ended; for any number of callers, at any time.
    pub(crate) async fn wait(&self) -> Option<Exit> {
        let mut phases = self.phase.subscribe();
        let phase = phases.wait_for(|phase| matches!(phase, Phase::Exited(_))).await.ok()?;
        match *phase {
            Phase::Exited(exit) => Some(exit),
            _ => None,
        }
    }

    fn publish_exit(&self, exit: Exit) {
        self.events.publish(&TaskExit {
            container_id: self.container_id.clone(),
            id: if self.exec_id.is_empty() { &self.container_id } else { &self.exec_id }.clone(),
            pid: self.pid,
            exit_status: exit_status(exit),
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        });
    }

    fn name(&self) -> String {
        if self.exec_id.is_empty() {
            format!("container {}", self.container_id)
        } else {
            format!("exec {} of container {}", self.exec_id, self.container_id)
        }
    }
}

/// An exit code as containerd's messages have it.
pub(crate) fn exit_status(exit: Exit) -> u32 {
    u32::try_from(exit.code).unwrap_or(255)
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::SystemTime};

    use tokio::sync::mpsc::Receiver;

    use super::*;
    use crate::events::{Item, tests::drain};

    fn process(exec_id: &str) -> (Arc<Process>, Receiver<Item>) {
        let (events, items) = Events::queue("n");
        (Arc::new(Process::new("c", exec_id, 7, Streams::default(), events)), items)
    }

    fn exit(code: i32) -> Exit {
        Exit { code, at: SystemTime::now() }
    }

    #[tokio::test]
    async fn an_exit_never_overtakes_its_start() {
        for exec_id in ["", "e"] {
            let (process, mut items) = process(exec_id);
            process.begin_start().unwrap();
            // The guest's answer to the start is still on its way, and the process has ended already.
            let finishing = tokio::spawn({
                let process = process.clone();
                async move { process.finish(exit(3)).await }
            });
            let waiting = tokio::spawn({
                let process = process.clone();
                async move { process.wait().await }
            });
            tokio::task::yield_now().await;
            assert_eq!(drain(&mut items), Vec::<String>::new());
            process.started();
            finishing.await.unwrap();
            assert_eq!(waiting.await.unwrap().unwrap().code, 3);
            let start = if exec_id.is_empty() { "/tasks/start" } else { "/tasks/exec-started" };
            assert_eq!(drain(&mut items), [start, "/tasks/exit"]);
        }
    }

    #[tokio::test]
    async fn an_exit_is_published_once() {
        let (process, mut items) = process("");
        process.begin_start().unwrap();
        process.started();
        process.finish(exit(1)).await;
        process.finish(exit(2)).await;
        assert_eq!(drain(&mut items), ["/tasks/start", "/tasks/exit"]);
        assert_eq!(process.wait().await.unwrap().code, 1);
        assert_eq!(process.wait().await.unwrap().code, 1);
    }

    #[tokio::test]
    async fn a_failed_start_releases_waiters_without_an_event() {
        let (process, mut items) = process("e");
        process.begin_start().unwrap();
        process.abandon(exit(127));
        process.finish(exit(0)).await;
        assert_eq!(process.wait().await.unwrap().code, 127);
        assert_eq!(drain(&mut items), Vec::<String>::new());
    }

    #[tokio::test]
    async fn a_process_killed_before_its_start_exits() {
        let (process, mut items) = process("");
        process.finish(exit(137)).await;
        assert_eq!(drain(&mut items), ["/tasks/exit"]);
        assert!(matches!(process.begin_start(), Err(Error::WrongState(_))));
    }

    #[tokio::test]
    async fn only_one_start_is_granted() {
        let (process, _items) = process("");
        process.begin_start().unwrap();
        assert!(matches!(process.begin_start(), Err(Error::WrongState(_))));
    }
}
