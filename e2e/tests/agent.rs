//! The guest agent in a real VM and as a plain process, alone. A file per family of requests below `agent/`; the runner of
//! the cases is the crate's, the VMs are `bulkhead_e2e::agent`'s.

#[path = "agent/containers.rs"]
mod containers;
#[path = "agent/containment.rs"]
mod containment;
#[path = "agent/devices.rs"]
mod devices;
#[path = "agent/faults.rs"]
mod faults;
#[path = "agent/files.rs"]
mod files;
#[path = "agent/image.rs"]
mod image;
#[path = "agent/load.rs"]
mod load;
#[path = "agent/memory.rs"]
mod memory;
#[path = "agent/network.rs"]
mod network;
#[path = "agent/policy.rs"]
mod policy;
#[path = "agent/ports.rs"]
mod ports;
#[path = "agent/rpc.rs"]
mod rpc;
#[path = "agent/storage.rs"]
mod storage;

use std::process::ExitCode;

use bulkhead_e2e::{Case, run};

/// A line a family.
#[rustfmt::skip]
const FAMILIES: &[&[Case]] = &[
    devices::CASES,
    memory::CASES,
    containment::CASES,
    faults::CASES,
    files::CASES,
    image::CASES,
    load::CASES,
    network::CASES,
    ports::CASES,
    policy::CASES,
    rpc::CASES,
    storage::CASES,
    containers::CASES,
];

fn main() -> ExitCode {
    run(&FAMILIES.concat())
}
