//! Volumes: their fill, their size, their mounts.

use std::sync::Arc;

use bulkhead_protocol::{
    Empty,
    agent::{
        RemoveStaleVirtiofsShareMountsRequest, ResizeVolumeRequest, UpdateEphemeralMountsRequest,
        VolumeStatsRequest,
    },
    csi::VolumeStatsResponse,
};

use super::{Service, system::own_machine};
use crate::{error::Result, sync::to_the_end, volume};

/// How full a volume is.
pub(super) async fn stats(service: &Service, request: VolumeStatsRequest) -> Result<VolumeStatsResponse> {
    let look = move || volume::stats(&request.volume_guest_path);
    service.lanes.volumes.bounded("look at a volume", look).await
}

/// Looks at every mount of the share; whether they answer is the host's to know.
pub(super) async fn remove_stale(
    service: &Service,
    _: RemoveStaleVirtiofsShareMountsRequest,
) -> Result<Empty> {
    service.sweep.run().await?;
    Ok(Empty::new())
}

/// Grows a volume's file system.
pub(super) async fn resize(service: &Service, request: ResizeVolumeRequest) -> Result<Empty> {
    if !volume::is_the_agents(&request.volume_guest_path) {
        own_machine(service, "file systems")?;
    }
    let resize = move || volume::resize(&request.volume_guest_path, request.size);
    service.lanes.volumes.bounded("resize a volume", resize).await?;
    Ok(Empty::new())
}

/// Changes the sizes of mounts of the guest's memory.
pub(super) async fn update_ephemeral(
    service: &Service,
    request: UpdateEphemeralMountsRequest,
) -> Result<Empty> {
    let sandbox = Arc::clone(&service.sandbox);
    to_the_end(async move { sandbox.update_ephemeral(request.storages).await }).await?;
    Ok(Empty::new())
}
