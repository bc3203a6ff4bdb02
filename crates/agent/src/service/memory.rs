//! The guest's processors and memory: what is plugged, and swap.

use bulkhead_protocol::{
    Empty,
    agent::{
        AddSwapPathRequest, AddSwapRequest, MemAgentCompactConfig, MemAgentMemcgConfig,
        MemHotplugByProbeRequest, OnlineCPUMemRequest,
    },
};

use super::Service;
use crate::error::{Error, Result};

/// Not built yet.
pub(super) async fn add_swap(_: &Service, _: AddSwapRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request AddSwap".into()))
}

/// Not built yet.
pub(super) async fn add_swap_path(_: &Service, _: AddSwapPathRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request AddSwapPath".into()))
}

/// Not built yet.
pub(super) async fn reclaim_compact(_: &Service, _: MemAgentCompactConfig) -> Result<Empty> {
    Err(Error::Unsupported("the request MemAgentCompactSet".into()))
}

/// Not built yet.
pub(super) async fn reclaim_memcg(_: &Service, _: MemAgentMemcgConfig) -> Result<Empty> {
    Err(Error::Unsupported("the request MemAgentMemcgSet".into()))
}

/// Not built yet.
pub(super) async fn probe(_: &Service, _: MemHotplugByProbeRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request MemHotplugByProbe".into()))
}

/// Not built yet.
pub(super) async fn online(_: &Service, _: OnlineCPUMemRequest) -> Result<Empty> {
    Err(Error::Unsupported("the request OnlineCPUMem".into()))
}
