//! The life of a container.

use std::{sync::Arc, time::Duration};

use bulkhead_protocol::{
    Empty,
    agent::{
        CreateContainerRequest, PauseContainerRequest, RemoveContainerRequest, ResumeContainerRequest,
        StartContainerRequest, StatsContainerRequest, StatsContainerResponse, UpdateContainerRequest,
    },
};

use super::Service;
use crate::{
    error::{Error, Result},
    network, passfd, stats,
    sync::{blocking, to_the_end},
};

/// Makes a container; its init waits before its command.
pub(super) async fn create(service: &Service, request: CreateContainerRequest) -> Result<Empty> {
    check_id(&request.container_id)?;
    let sandbox = Arc::clone(&service.sandbox);
    let streams = sandbox.passed.take([request.stdin_port, request.stdout_port, request.stderr_port]).await?;
    let id = request.container_id.clone();
    to_the_end(async move {
        sandbox.create_container(request).await?;
        passfd::attach(streams, &sandbox.container(&id)?, &id).await
    })
    .await?;
    Ok(Empty::new())
}

/// An id becomes a path and a cgroup: `[a-zA-Z0-9][a-zA-Z0-9_.-]+`.
fn check_id(id: &str) -> Result<()> {
    let word = |byte: u8| byte.is_ascii_alphanumeric();
    let rest = |byte: u8| word(byte) || b"_.-".contains(&byte);
    let valid = match id.as_bytes() {
        [first, others @ ..] => {
            word(*first) && !others.is_empty() && id.len() <= 255 && others.iter().copied().all(rest)
        }
        [] => false,
    };
    if valid { Ok(()) } else { Err(Error::Invalid(format!("{id:?} is not a valid container id"))) }
}

/// Releases init into its command.
pub(super) async fn start(service: &Service, request: StartContainerRequest) -> Result<Empty> {
    let container = service.sandbox.container(&request.container_id)?;
    // From its first moment on the container can lack memory. Nobody asks about the sandbox's own.
    if let Some(events) = container.executor.memory_events()
        && !service.sandbox.is_its_own(container.id())
    {
        service.sandbox.oom.watch(container.id(), events)?;
    }
    to_the_end(async move { container.start().await }).await?;
    Ok(Empty::new())
}

/// Kills and forgets a container. When the time runs out the removal goes on, and a further request waits for it.
pub(super) async fn remove(service: &Service, request: RemoveContainerRequest) -> Result<Empty> {
    let (sandbox, id) = (Arc::clone(&service.sandbox), request.container_id.clone());
    let removal = to_the_end(async move { sandbox.remove_container(&id).await });
    if request.timeout == 0 {
        removal.await?;
    } else {
        let patience = Duration::from_secs(request.timeout.into());
        tokio::time::timeout(patience, removal).await.unwrap_or_else(|_| {
            let (id, seconds) = (&request.container_id, request.timeout);
            Err(Error::Timeout(format!(
                "container {id:?} was not removed within {seconds} s; its removal goes on"
            )))
        })?;
    }
    Ok(Empty::new())
}

/// Changes limits; those that the request leaves out stay.
pub(super) async fn update(service: &Service, request: UpdateContainerRequest) -> Result<Empty> {
    let container = service.sandbox.container(&request.container_id)?;
    if let Some(resources) = request.resources.into_option() {
        to_the_end(async move { container.control(move |c| c.update(&resources)).await }).await?;
    }
    Ok(Empty::new())
}

/// Reads a container's figures.
pub(super) async fn stats(
    service: &Service,
    request: StatsContainerRequest,
) -> Result<StatsContainerResponse> {
    let container = service.sandbox.container(&request.container_id)?;
    let cgroup_stats =
        Some(stats::to_wire(container.control(bulkhead_executor::Container::stats).await?)).into();
    let network_stats = blocking(network::stats).await?;
    Ok(StatsContainerResponse { cgroup_stats, network_stats, ..Default::default() })
}

/// Freezes a container.
pub(super) async fn pause(service: &Service, request: PauseContainerRequest) -> Result<Empty> {
    let container = service.sandbox.container(&request.container_id)?;
    to_the_end(async move { container.control(bulkhead_executor::Container::pause).await }).await?;
    Ok(Empty::new())
}

/// Thaws a container.
pub(super) async fn resume(service: &Service, request: ResumeContainerRequest) -> Result<Empty> {
    let container = service.sandbox.container(&request.container_id)?;
    to_the_end(async move { container.control(bulkhead_executor::Container::resume).await }).await?;
    Ok(Empty::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_plain_words() {
        for id in ["c1", "Ab_c.d-e", "0123456789abcdef"] {
            assert!(check_id(id).is_ok(), "{id:?}");
        }
        for id in ["", "c", "-c", ".c", "a/b", "a b", "ü1", "a\0", &"x".repeat(256)] {
            assert!(matches!(check_id(id), Err(Error::Invalid(_))), "{id:?}");
        }
    }
}
