//! The guest agent in a real VM and as a plain process, alone. A file per family of requests below `agent/`; the runner of
//! the cases is the crate's, the VMs are `bulkhead_e2e::agent`'s.

#[path = "agent/containment.rs"]
mod containment;
#[path = "agent/faults.rs"]
mod faults;
#[path = "agent/load.rs"]
mod load;
#[path = "agent/policy.rs"]
mod policy;
#[path = "agent/rpc.rs"]
mod rpc;

use std::process::ExitCode;

use bulkhead_e2e::{Case, run};

/// A line a family.
#[rustfmt::skip]
const FAMILIES: &[&[Case]] = &[
    containment::CASES,
    faults::CASES,
    load::CASES,
    policy::CASES,
    rpc::CASES,
];

fn main() -> ExitCode {
    run(&FAMILIES.concat())
}
