//! The guest as containers and processes see it: an agent to call, and the news that the VM is gone.

use std::{
    future::Future,
    time::{Duration, SystemTime},
};

use bulkhead_hypervisor::{Error as VmError, VmExit};
use bulkhead_protocol::{agent_ttrpc::AgentServiceClient, status::Kind};
use tokio::sync::watch;
use ttrpc::context::Context;

use crate::{
    Error,
    agent::{Agent, Patience},
};

/// After a call failed for want of a connection, the VM's end (with its last words) is waited for at most this long.
const EXPLANATION_BOUND: Duration = Duration::from_secs(5);

/// One guest. Containers share it; it does not keep the VM alive.
pub(crate) struct Guest {
    agent: Agent,
    gone: watch::Receiver<Option<VmExit>>,
}

impl std::fmt::Debug for Guest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guest").field("gone", &self.exit().is_some()).finish_non_exhaustive()
    }
}

impl Guest {
    pub(crate) fn new(agent: Agent, gone: watch::Receiver<Option<VmExit>>) -> Guest {
        Guest { agent, gone }
    }

    pub(crate) fn agent(&self) -> &Agent {
        &self.agent
    }

    /// One call to the agent; when the VM is gone, or goes meanwhile, the error is the VM's, with its last words.
    pub(crate) async fn call<R, F>(
        &self,
        operation: &'static str,
        patience: Patience,
        rpc: impl FnOnce(AgentServiceClient, Context) -> F,
    ) -> Result<R, Error>
    where
        R: Send + 'static,
        F: Future<Output = ttrpc::Result<R>> + Send + 'static,
    {
        if let Some(exit) = self.exit() {
            return Err(vm_gone(exit));
        }
        let result = tokio::select! {
            biased;
            result = self.agent.call(operation, patience, rpc) => result,
            exit = self.gone() => return Err(vm_gone(exit)),
        };
        match result {
            Err(Error::Agent { kind: Kind::Unavailable, .. }) => {
                match tokio::time::timeout(EXPLANATION_BOUND, self.gone()).await {
                    Ok(exit) => Err(vm_gone(exit)),
                    Err(_) => result,
                }
            }
            result => result,
        }
    }

    /// How the VM ended, when it has.
    pub(crate) fn exit(&self) -> Option<VmExit> {
        self.gone.borrow().clone()
    }

    /// Resolves when the VM is gone.
    pub(crate) async fn gone(&self) -> VmExit {
        let mut gone = self.gone.clone();
        let exit = gone.wait_for(Option::is_some).await.ok().and_then(|exit| exit.clone());
        exit.unwrap_or_else(|| VmExit {
            code: 137,
            at: SystemTime::now(),
            last_words: "the sandbox was dropped".into(),
        })
    }
}

/// The error of everything that needs a VM that is no more.
pub(crate) fn vm_gone(exit: VmExit) -> Error {
    Error::Vm(VmError::VmmExited { code: exit.code, last_words: exit.last_words })
}
