//! The guest's processors and memory: what is plugged, and swap.

use std::{path::Path, sync::Arc, time::Duration};

use bulkhead_protocol::{
    Empty,
    agent::{
        AddSwapPathRequest, AddSwapRequest, MemAgentCompactConfig, MemAgentMemcgConfig,
        MemHotplugByProbeRequest, OnlineCPUMemRequest,
    },
};

use super::{Service, system::own_machine};
use crate::{
    device::PciPath,
    error::{During, Error, Result},
    hotplug,
    sync::{blocking, to_the_end},
    sys,
};

/// How long a request that says that it waits does so: no longer than hosts wait for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// How long any other waits at least, as hosts expect it.
const USUAL: Duration = Duration::from_secs(5);

/// Brings processors online until there are as many as wanted (0: whatever there is), then all memory, unless it is about
/// processors only. Processors that were just plugged may still be on their way: there is a wait for them in any case, a
/// longer one if the request says so.
pub(super) async fn online(service: &Service, request: OnlineCPUMemRequest) -> Result<Empty> {
    own_machine(service, "processors and memory")?;
    let devices = Arc::clone(&service.sandbox.devices);
    let usual = service.sandbox.config.hotplug_timeout;
    to_the_end(async move {
        let OnlineCPUMemRequest { nb_cpus, wait, cpu_only, .. } = request;
        if nb_cpus > 0 {
            let patience = patience(wait, usual);
            let what = format!("{nb_cpus} processors were not online");
            let look = move |places: &_| hotplug::processors(places, nb_cpus);
            devices.appears(&what, &["cpu"], patience, look).await?;
        }
        if !cpu_only {
            let places = devices.places();
            blocking(move || hotplug::memory(&places)).await?;
        }
        Ok(())
    })
    .await?;
    Ok(Empty::new())
}

fn patience(wait: bool, hotplug: Duration) -> Duration {
    hotplug.max(if wait { PATIENCE } else { USUAL })
}

/// Tells the kernel where memory was plugged.
pub(super) async fn probe(service: &Service, request: MemHotplugByProbeRequest) -> Result<Empty> {
    own_machine(service, "memory")?;
    let places = service.sandbox.devices.places();
    to_the_end(blocking(move || hotplug::probe(&places, &request.memHotplugProbeAddr))).await?;
    Ok(Empty::new())
}

/// Swaps to the disk at a path of PCI slots, which the host has formatted.
pub(super) async fn add_swap(service: &Service, request: AddSwapRequest) -> Result<Empty> {
    let path = PciPath::of_slots(&request.PCIPath)?;
    own_machine(service, "swap")?;
    let devices = Arc::clone(&service.sandbox.devices);
    to_the_end(async move {
        let disk = devices.block_at(path).await?;
        blocking(move || swap_on(&disk.path)).await
    })
    .await?;
    Ok(Empty::new())
}

/// Swaps to a file or disk of the guest, which the host has formatted.
pub(super) async fn add_swap_path(service: &Service, request: AddSwapPathRequest) -> Result<Empty> {
    let path = request.path;
    if !path.starts_with('/') || path.contains('\0') {
        return Err(Error::Invalid(format!("{path:?} is not an absolute path to swap to")));
    }
    own_machine(service, "swap")?;
    to_the_end(blocking(move || swap_on(Path::new(&path)))).await?;
    Ok(Empty::new())
}

fn swap_on(path: &Path) -> Result<()> {
    sys::swap_on(path).during(|| format!("swap to {}", path.display()))
}

/// There is nothing to be set.
pub(super) async fn reclaim_compact(_: &Service, _: MemAgentCompactConfig) -> Result<Empty> {
    Err(no_reclaimer("MemAgentCompactSet"))
}

/// There is nothing to be set.
pub(super) async fn reclaim_memcg(_: &Service, _: MemAgentMemcgConfig) -> Result<Empty> {
    Err(no_reclaimer("MemAgentMemcgSet"))
}

fn no_reclaimer(request: &str) -> Error {
    Error::Unsupported(format!(
        "{request}: it has no reclaimer of its own that could be set; memory that the guest's kernel has free goes back to the host by free page reporting"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_waited_for_as_hosts_expect_and_no_less_than_devices() {
        let seconds = Duration::from_secs;
        for (wait, hotplug, expected) in [(false, 3, 5), (false, 10, 10), (true, 3, 60), (true, 120, 120)] {
            assert_eq!(patience(wait, seconds(hotplug)), seconds(expected));
        }
    }
}
