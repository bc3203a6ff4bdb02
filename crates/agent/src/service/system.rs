//! The guest as a machine: what it is, how it does, its clock and its randomness.

use std::{fs, io::Write, os::fd::AsFd};

use bulkhead_protocol::{
    Empty,
    agent::{
        AgentDetails, GetMetricsRequest, GuestDetailsRequest, GuestDetailsResponse, Metrics,
        ReseedRandomDevRequest, SetGuestDateTimeRequest, SetPolicyRequest,
    },
};
use rustix::time::{ClockId, Timespec};

use super::Service;
use crate::{
    device,
    error::{During, Error, Result},
    storage,
    sync::blocking,
    sys,
};

const MEMORY: &str = "/sys/devices/system/memory";

/// Tells what the agent can do, and how the guest's memory can grow.
pub(super) async fn details(service: &Service, request: GuestDetailsRequest) -> Result<GuestDetailsResponse> {
    let details = AgentDetails {
        version: env!("CARGO_PKG_VERSION").into(),
        init_daemon: service.sandbox.guest.init,
        device_handlers: device::types(),
        storage_handlers: storage::drivers(),
        supports_seccomp: true,
        extra_features: vec!["agent-policy".into(), "seccomp".into()],
        ..Default::default()
    };
    let mut response = GuestDetailsResponse { agent_details: Some(details).into(), ..Default::default() };
    if request.mem_block_size {
        response.mem_block_size_bytes = memory_block_size()?;
    }
    if request.mem_hotplug_probe {
        response.support_mem_hotplug_probe = fs::exists(format!("{MEMORY}/probe")).unwrap_or(false);
    }
    Ok(response)
}

/// The size in bytes, 0 where the kernel cannot add memory.
fn memory_block_size() -> Result<u64> {
    let path = format!("{MEMORY}/block_size_bytes");
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(0),
        text => u64::from_str_radix(text.during(|| format!("read {path}"))?.trim(), 16)
            .map_err(std::io::Error::other)
            .during(|| format!("understand {path}")),
    }
}

/// The agent's figures.
pub(super) async fn metrics(service: &Service, _: GetMetricsRequest) -> Result<Metrics> {
    let metrics = service.metrics.clone();
    let metrics =
        service.lanes.metrics.bounded("look at the guest's figures", move || Ok(metrics.text())).await?;
    Ok(Metrics { metrics, ..Default::default() })
}

/// Mixes randomness of the host into the guest's.
pub(super) async fn reseed(service: &Service, request: ReseedRandomDevRequest) -> Result<Empty> {
    own_machine(service, "random pool")?;
    if request.data.is_empty() {
        return Err(Error::Invalid("missing entropy data".into()));
    }
    blocking(move || {
        let what = || "reseed /dev/random".to_owned();
        let mut random = fs::OpenOptions::new().write(true).open("/dev/random").during(what)?;
        random.write_all(&request.data).during(what)?;
        sys::credit_entropy(random.as_fd(), bits(request.data.len())).during(what)
    })
    .await?;
    Ok(Empty::new())
}

/// The kernel counts randomness in bits, not in bytes.
fn bits(bytes: usize) -> i32 {
    i32::try_from(bytes.saturating_mul(8)).unwrap_or(i32::MAX)
}

/// Sets the guest's clock.
pub(super) async fn set_time(service: &Service, request: SetGuestDateTimeRequest) -> Result<Empty> {
    own_machine(service, "clock")?;
    if !(0..1_000_000).contains(&request.Usec) {
        return Err(Error::Invalid(format!("{} microseconds are not part of a second", request.Usec)));
    }
    let time = Timespec { tv_sec: request.Sec, tv_nsec: request.Usec * 1000 };
    rustix::time::clock_settime(ClockId::Realtime, time)
        .during(|| format!("set the clock to {} s", request.Sec))?;
    Ok(Empty::new())
}

/// Replaces the policy that requests are held against.
pub(super) async fn set_policy(service: &Service, request: SetPolicyRequest) -> Result<Empty> {
    service.policy.replace(&request.policy)?;
    Ok(Empty::new())
}

/// An agent that runs as a plain process is a guest itself, and leaves its host's machine alone.
pub(super) fn own_machine(service: &Service, what: &str) -> Result<()> {
    if service.sandbox.guest.init {
        return Ok(());
    }
    Err(Error::State(format!("the {what} is not the agent's to change: it is not the init of a guest")))
}

#[cfg(test)]
mod tests {
    #[test]
    fn entropy_is_credited_in_bits() {
        for (bytes, bits) in [(0, 0), (1, 8), (512, 4096), (1 << 28, i32::MAX), (usize::MAX, i32::MAX)] {
            assert_eq!(super::bits(bytes), bits);
        }
    }
}
