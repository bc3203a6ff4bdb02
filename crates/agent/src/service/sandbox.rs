//! The pod as a whole.

use std::sync::Arc;

use bulkhead_protocol::{
    Empty,
    agent::{CreateSandboxRequest, DestroySandboxRequest, GetOOMEventRequest, KernelModule, OOMEvent},
};

use super::Service;
use crate::{
    error::{Error, Result},
    modules,
    sync::to_the_end,
};

/// Prepares what the pod's containers share: host name, resolver, IPC namespace, storages.
pub(super) async fn create(service: &Service, request: CreateSandboxRequest) -> Result<Empty> {
    let sandbox = Arc::clone(&service.sandbox);
    to_the_end(async move {
        sandbox.guest.prepared().await;
        request.kernel_modules.iter().try_for_each(check_module)?;
        sandbox.create(request).await
    })
    .await?;
    Ok(Empty::new())
}

/// The guest loads at boot what it has, so a module is there or there is none.
fn check_module(module: &KernelModule) -> Result<()> {
    if !modules::is_present(&module.name) {
        return Err(Error::Invalid(format!("the guest has no kernel module {:?}", module.name)));
    }
    if !module.parameters.is_empty() {
        return Err(Error::Unsupported(format!(
            "parameters for the kernel module {:?}, which is loaded",
            module.name
        )));
    }
    Ok(())
}

/// Ends the pod; the server answers, and then the agent ends as well.
pub(super) async fn destroy(service: &Service, _: DestroySandboxRequest) -> Result<Empty> {
    let sandbox = Arc::clone(&service.sandbox);
    to_the_end(async move {
        sandbox.destroy().await;
        Ok(())
    })
    .await?;
    Ok(Empty::new())
}

/// Waits for a container that lacks memory.
pub(super) async fn oom_event(service: &Service, _: GetOOMEventRequest) -> Result<OOMEvent> {
    match service.sandbox.oom.next().await {
        Some(container_id) => Ok(OOMEvent { container_id, ..Default::default() }),
        None => Err(Error::State("the sandbox is gone, and no event will come".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_module_is_refused_by_name() {
        let module = KernelModule { name: "surely_not_a_module".into(), ..Default::default() };
        assert!(check_module(&module).unwrap_err().to_string().contains("surely_not_a_module"));
    }
}
