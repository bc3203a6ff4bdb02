//! What a backend gives up before it talks to a guest.

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{
        CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs,
    },
};

/// Gives up all capabilities, and the chance of new ones.
pub(crate) fn drop_all() -> rustix::io::Result<()> {
    keep(CapabilitySet::empty())
}

/// Gives up all capabilities but `kept`, and the chance of new ones. For this thread and those it starts later.
pub(crate) fn keep(kept: CapabilitySet) -> rustix::io::Result<()> {
    set_no_new_privs(true)?;
    for dropped in CapabilitySet::all().difference(kept).iter() {
        // EINVAL: newer than the kernel. EPERM: without SETPCAP the bounding set stays, and matters nothing, because
        // nothing is executed and no_new_privs is set.
        match remove_capability_from_bounding_set(dropped) {
            Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
            Err(error) => return Err(error),
        }
    }
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}

/// As many open files as the guest could want; a lower hard limit is accepted. Returns the limit.
pub(crate) fn raise_descriptor_limit() -> rustix::io::Result<u64> {
    const WANTED: u64 = 1_000_000;
    let now = getrlimit(Resource::Nofile);
    let (soft, hard) = (now.current.unwrap_or(u64::MAX), now.maximum.unwrap_or(u64::MAX));
    if soft >= WANTED {
        return Ok(soft);
    }
    let set = |limit: u64, hard: u64| {
        setrlimit(Resource::Nofile, Rlimit { current: Some(limit), maximum: Some(hard) }).map(|()| limit)
    };
    // Beyond the hard limit only with privileges, and never beyond the kernel's own (fs.nr_open).
    set(WANTED, hard.max(WANTED)).or_else(|_| set(hard, hard))
}
