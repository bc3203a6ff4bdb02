//! The pod as a whole.

use std::sync::Arc;

use bulkhead_protocol::{
    Empty,
    agent::{CreateSandboxRequest, DestroySandboxRequest, GetOOMEventRequest, KernelModule, OOMEvent},
};

use super::Service;
use crate::{
    boot::Guest,
    error::{Error, Result},
    sync::{blocking, to_the_end},
};

/// Prepares what the pod's containers share: host name, resolver, IPC namespace, storages.
pub(super) async fn create(service: &Service, mut request: CreateSandboxRequest) -> Result<Empty> {
    let sandbox = Arc::clone(&service.sandbox);
    to_the_end(async move {
        sandbox.guest.prepared().await;
        let (guest, modules) = (Arc::clone(&sandbox.guest), std::mem::take(&mut request.kernel_modules));
        blocking(move || load_modules(&guest, &modules)).await?;
        sandbox.create(request).await
    })
    .await?;
    Ok(Empty::new())
}

/// Loads what the host wants loaded, in its order.
fn load_modules(guest: &Guest, modules: &[KernelModule]) -> Result<()> {
    modules.iter().try_for_each(|module| guest.load_module(&module.name, &module.parameters.join(" ")))
}

/// Ends the pod; the server answers, and then the agent ends as well.
pub(super) async fn destroy(service: &Service, _: DestroySandboxRequest) -> Result<Empty> {
    service.copies.clear();
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
        let error = load_modules(&Guest::plain(), &[module]).unwrap_err();
        assert!(error.to_string().contains("surely_not_a_module"), "{error}");
    }
}
