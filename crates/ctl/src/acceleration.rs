//! Whether KVM works here: found out once on each host, and not in silence.

use bulkhead_hypervisor::AccelQuery;
use bulkhead_sandbox::{Config, Hypervisor};

use crate::streams;

/// The question that a boot with this configuration asks.
pub(crate) fn query(config: &Config) -> AccelQuery<'_> {
    AccelQuery {
        policy: config.accel,
        vmm: &config.vmm,
        kernel: &config.kernel,
        initramfs: &config.initramfs,
        machine: &config.machine,
        cache_dir: &config.cache_dir,
    }
}

/// Says why the first boot on a host takes longer.
pub(crate) fn announce_probe(config: &Config) {
    if config.hypervisor == Hypervisor::Qemu && query(config).would_probe() {
        streams::say("bulkhead: finding out once whether KVM works here (at most 10 s)");
    }
}
