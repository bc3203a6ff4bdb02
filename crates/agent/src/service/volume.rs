//! Volumes: their fill, their size, their mounts.

use bulkhead_protocol::{
    Empty,
    agent::{
        RemoveStaleVirtiofsShareMountsRequest, ResizeVolumeRequest, UpdateEphemeralMountsRequest,
        VolumeStatsRequest,
    },
    csi::VolumeStatsResponse,
};

use super::Service;
use crate::error::{Error, Result};

/// Not built yet.
pub(super) async fn stats(_: &Service, _: VolumeStatsRequest) -> Result<VolumeStatsResponse> {
    Err(Error::Unsupported("the request GetVolumeStats".into()))
}

/// Not built yet.
pub(super) async fn remove_stale(_: &Service, _: RemoveStaleVirtiofsShareMountsRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request RemoveStaleVirtiofsShareMounts".into()))
}

/// Not built yet.
pub(super) async fn resize(_: &Service, _: ResizeVolumeRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request ResizeVolume".into()))
}

/// Not built yet.
pub(super) async fn update_ephemeral(_: &Service, _: UpdateEphemeralMountsRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request UpdateEphemeralMounts".into()))
}
