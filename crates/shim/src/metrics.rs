//! The agent's figures in containerd's two forms. Clients expect the form of the host's cgroups, whatever the guest has;
//! so each field is looked for under its name in either version.

use std::{collections::BTreeMap, path::Path};

use bulkhead_protocol::agent::{
    BlkioStatsEntry, CgroupStats, CpuStats, MemoryData, MemoryStats, NetworkStats, StatsContainerResponse,
};
use containerd_shim_protos::{cgroups::metrics as v1, cgroups_v2::metrics as v2};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};
use protobuf::{Message, MessageField, well_known_types::any::Any};

/// A cgroup version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    /// One hierarchy a controller, or the hybrid of both.
    V1,
    /// The unified hierarchy.
    V2,
}

impl Version {
    /// The host's: v2 only when the unified hierarchy is all there is.
    pub(crate) fn of_host() -> Version {
        match statfs(Path::new("/sys/fs/cgroup")) {
            Ok(fs) if fs.filesystem_type() == CGROUP2_SUPER_MAGIC => Version::V2,
            _ => Version::V1,
        }
    }
}

/// The figures in the form that clients on a host with this cgroup version expect.
pub(crate) fn metrics(stats: &StatsContainerResponse, version: Version) -> Result<Any, protobuf::Error> {
    let cgroup = stats.cgroup_stats.get_or_default();
    match version {
        Version::V1 => any("io.containerd.cgroups.v1.Metrics", &metrics_v1(cgroup, &stats.network_stats)),
        Version::V2 => any("io.containerd.cgroups.v2.Metrics", &metrics_v2(cgroup, &stats.network_stats)),
    }
}

fn any(name: &str, message: &impl Message) -> Result<Any, protobuf::Error> {
    Ok(Any { type_url: name.to_owned(), value: message.write_to_bytes()?, ..Default::default() })
}

fn metrics_v1(cgroup: &CgroupStats, network: &[NetworkStats]) -> v1::Metrics {
    v1::Metrics {
        pids: MessageField::some(v1::PidsStat {
            current: cgroup.pids_stats.current,
            limit: cgroup.pids_stats.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu_v1(&cgroup.cpu_stats)),
        memory: MessageField::some(memory_v1(&cgroup.memory_stats)),
        blkio: MessageField::some(blkio_v1(cgroup)),
        hugetlb: sorted(&cgroup.hugetlb_stats)
            .map(|(size, stats)| v1::HugetlbStat {
                usage: stats.usage,
                max: stats.max_usage,
                failcnt: stats.failcnt,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        network: network.iter().map(network_v1).collect(),
        ..Default::default()
    }
}

fn cpu_v1(cpu: &CpuStats) -> v1::CPUStat {
    v1::CPUStat {
        usage: MessageField::some(v1::CPUUsage {
            total: cpu.cpu_usage.total_usage,
            kernel: cpu.cpu_usage.usage_in_kernelmode,
            user: cpu.cpu_usage.usage_in_usermode,
            per_cpu: cpu.cpu_usage.percpu_usage.clone(),
            ..Default::default()
        }),
        throttling: MessageField::some(v1::Throttle {
            periods: cpu.throttling_data.periods,
            throttled_periods: cpu.throttling_data.throttled_periods,
            throttled_time: cpu.throttling_data.throttled_time,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory_v1(memory: &MemoryStats) -> v1::MemoryStat {
    // `total_x` of v1 counts the children too, which v2's `x` always does.
    let find = |names: &[&str]| names.iter().find_map(|name| memory.stats.get(*name)).copied().unwrap_or(0);
    let both =
        |name: &str, newer: &str| (find(&[name, newer]), find(&[&format!("total_{name}"), name, newer]));
    let (rss, total_rss) = both("rss", "anon");
    let (rss_huge, total_rss_huge) = both("rss_huge", "anon_thp");
    let (cache, total_cache) = both("cache", "file");
    let (mapped_file, total_mapped_file) = both("mapped_file", "file_mapped");
    let (dirty, total_dirty) = both("dirty", "file_dirty");
    let (writeback, total_writeback) = both("writeback", "file_writeback");
    let (pg_fault, total_pg_fault) = both("pgfault", "pgfault");
    let (pg_maj_fault, total_pg_maj_fault) = both("pgmajfault", "pgmajfault");
    let (inactive_anon, total_inactive_anon) = both("inactive_anon", "inactive_anon");
    let (active_anon, total_active_anon) = both("active_anon", "active_anon");
    let (inactive_file, total_inactive_file) = both("inactive_file", "inactive_file");
    let (active_file, total_active_file) = both("active_file", "active_file");
    let (unevictable, total_unevictable) = both("unevictable", "unevictable");
    v1::MemoryStat {
        cache: if memory.cache > 0 { memory.cache } else { cache },
        rss,
        rss_huge,
        mapped_file,
        dirty,
        writeback,
        pg_pg_in: find(&["pgpgin"]),
        pg_pg_out: find(&["pgpgout"]),
        pg_fault,
        pg_maj_fault,
        inactive_anon,
        active_anon,
        inactive_file,
        active_file,
        unevictable,
        hierarchical_memory_limit: find(&["hierarchical_memory_limit"]),
        hierarchical_swap_limit: find(&["hierarchical_memsw_limit"]),
        total_cache: if memory.cache > 0 { total_cache.max(memory.cache) } else { total_cache },
        total_rss,
        total_rss_huge,
        total_mapped_file,
        total_dirty,
        total_writeback,
        total_pg_pg_in: find(&["total_pgpgin", "pgpgin"]),
        total_pg_pg_out: find(&["total_pgpgout", "pgpgout"]),
        total_pg_fault,
        total_pg_maj_fault,
        total_inactive_anon,
        total_active_anon,
        total_inactive_file,
        total_active_file,
        total_unevictable,
        usage: entry_v1(&memory.usage),
        swap: entry_v1(&memory.swap_usage),
        kernel: entry_v1(&memory.kernel_usage),
        ..Default::default()
    }
}

fn entry_v1(data: &MessageField<MemoryData>) -> MessageField<v1::MemoryEntry> {
    MessageField::some(v1::MemoryEntry {
        limit: data.limit,
        usage: data.usage,
        max: data.max_usage,
        failcnt: data.failcnt,
        ..Default::default()
    })
}

fn blkio_v1(cgroup: &CgroupStats) -> v1::BlkIOStat {
    let list = |entries: &[BlkioStatsEntry]| {
        entries
            .iter()
            .map(|entry| v1::BlkIOEntry {
                op: entry.op.clone(),
                device: format!("{}:{}", entry.major, entry.minor),
                major: entry.major,
                minor: entry.minor,
                value: entry.value,
                ..Default::default()
            })
            .collect()
    };
    let blkio = &cgroup.blkio_stats;
    v1::BlkIOStat {
        io_service_bytes_recursive: list(&blkio.io_service_bytes_recursive),
        io_serviced_recursive: list(&blkio.io_serviced_recursive),
        io_queued_recursive: list(&blkio.io_queued_recursive),
        io_service_time_recursive: list(&blkio.io_service_time_recursive),
        io_wait_time_recursive: list(&blkio.io_wait_time_recursive),
        io_merged_recursive: list(&blkio.io_merged_recursive),
        io_time_recursive: list(&blkio.io_time_recursive),
        sectors_recursive: list(&blkio.sectors_recursive),
        ..Default::default()
    }
}

fn network_v1(network: &NetworkStats) -> v1::NetworkStat {
    v1::NetworkStat {
        name: network.name.clone(),
        rx_bytes: network.rx_bytes,
        rx_packets: network.rx_packets,
        rx_errors: network.rx_errors,
        rx_dropped: network.rx_dropped,
        tx_bytes: network.tx_bytes,
        tx_packets: network.tx_packets,
        tx_errors: network.tx_errors,
        tx_dropped: network.tx_dropped,
        ..Default::default()
    }
}

fn metrics_v2(cgroup: &CgroupStats, network: &[NetworkStats]) -> v2::Metrics {
    v2::Metrics {
        pids: MessageField::some(v2::PidsStat {
            current: cgroup.pids_stats.current,
            limit: cgroup.pids_stats.limit,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu_v2(&cgroup.cpu_stats)),
        memory: MessageField::some(memory_v2(&cgroup.memory_stats)),
        io: MessageField::some(io_v2(cgroup)),
        hugetlb: sorted(&cgroup.hugetlb_stats)
            .map(|(size, stats)| v2::HugeTlbStat {
                current: stats.usage,
                max: stats.max_usage,
                failcnt: stats.failcnt,
                pagesize: size.clone(),
                ..Default::default()
            })
            .collect(),
        network: network.iter().map(network_v2).collect(),
        ..Default::default()
    }
}

/// The agent counts nanoseconds, version 2 microseconds.
fn cpu_v2(cpu: &CpuStats) -> v2::CPUStat {
    v2::CPUStat {
        usage_usec: cpu.cpu_usage.total_usage / 1000,
        user_usec: cpu.cpu_usage.usage_in_usermode / 1000,
        system_usec: cpu.cpu_usage.usage_in_kernelmode / 1000,
        nr_periods: cpu.throttling_data.periods,
        nr_throttled: cpu.throttling_data.throttled_periods,
        throttled_usec: cpu.throttling_data.throttled_time / 1000,
        ..Default::default()
    }
}

fn memory_v2(memory: &MemoryStats) -> v2::MemoryStat {
    let find = |names: &[&str]| names.iter().find_map(|name| memory.stats.get(*name)).copied().unwrap_or(0);
    v2::MemoryStat {
        anon: find(&["anon", "total_rss", "rss"]),
        file: match find(&["file", "total_cache", "cache"]) {
            0 => memory.cache,
            file => file,
        },
        kernel_stack: find(&["kernel_stack"]),
        slab: find(&["slab"]),
        sock: find(&["sock"]),
        shmem: find(&["shmem"]),
        file_mapped: find(&["file_mapped", "total_mapped_file", "mapped_file"]),
        file_dirty: find(&["file_dirty", "total_dirty", "dirty"]),
        file_writeback: find(&["file_writeback", "total_writeback", "writeback"]),
        anon_thp: find(&["anon_thp", "total_rss_huge", "rss_huge"]),
        inactive_anon: find(&["inactive_anon"]),
        active_anon: find(&["active_anon"]),
        inactive_file: find(&["inactive_file"]),
        active_file: find(&["active_file"]),
        unevictable: find(&["unevictable"]),
        slab_reclaimable: find(&["slab_reclaimable"]),
        slab_unreclaimable: find(&["slab_unreclaimable"]),
        pgfault: find(&["pgfault"]),
        pgmajfault: find(&["pgmajfault"]),
        workingset_refault: find(&["workingset_refault", "workingset_refault_file"]),
        workingset_activate: find(&["workingset_activate", "workingset_activate_file"]),
        workingset_nodereclaim: find(&["workingset_nodereclaim"]),
        pgrefill: find(&["pgrefill"]),
        pgscan: find(&["pgscan"]),
        pgsteal: find(&["pgsteal"]),
        pgactivate: find(&["pgactivate"]),
        pgdeactivate: find(&["pgdeactivate"]),
        pglazyfree: find(&["pglazyfree"]),
        pglazyfreed: find(&["pglazyfreed"]),
        thp_fault_alloc: find(&["thp_fault_alloc"]),
        thp_collapse_alloc: find(&["thp_collapse_alloc"]),
        usage: memory.usage.usage,
        usage_limit: memory.usage.limit,
        max_usage: memory.usage.max_usage,
        swap_usage: memory.swap_usage.usage,
        swap_limit: memory.swap_usage.limit,
        swap_max_usage: memory.swap_usage.max_usage,
        ..Default::default()
    }
}

/// One entry a device. Guests with version 2 report operation counts among the bytes, under names of their own.
fn io_v2(cgroup: &CgroupStats) -> v2::IOStat {
    let blkio = &cgroup.blkio_stats;
    let mut devices: BTreeMap<(u64, u64), v2::IOEntry> = BTreeMap::new();
    let mut add = |entry: &BlkioStatsEntry, counts: bool| {
        let device = devices.entry((entry.major, entry.minor)).or_insert_with(|| v2::IOEntry {
            major: entry.major,
            minor: entry.minor,
            ..Default::default()
        });
        match (entry.op.to_ascii_lowercase().as_str(), counts) {
            ("read" | "rbytes", false) => device.rbytes = entry.value,
            ("write" | "wbytes", false) => device.wbytes = entry.value,
            ("rios", _) | ("read", true) => device.rios = entry.value,
            ("wios", _) | ("write", true) => device.wios = entry.value,
            _ => {}
        }
    };
    blkio.io_service_bytes_recursive.iter().for_each(|entry| add(entry, false));
    blkio.io_serviced_recursive.iter().for_each(|entry| add(entry, true));
    v2::IOStat { usage: devices.into_values().collect(), ..Default::default() }
}

fn network_v2(network: &NetworkStats) -> v2::NetworkStat {
    v2::NetworkStat {
        name: network.name.clone(),
        rx_bytes: network.rx_bytes,
        rx_packets: network.rx_packets,
        rx_errors: network.rx_errors,
        rx_dropped: network.rx_dropped,
        tx_bytes: network.tx_bytes,
        tx_packets: network.tx_packets,
        tx_errors: network.tx_errors,
        tx_dropped: network.tx_dropped,
        ..Default::default()
    }
}

fn sorted<V>(map: &std::collections::HashMap<String, V>) -> impl Iterator<Item = (&String, &V)> {
    map.iter().collect::<BTreeMap<_, _>>().into_iter()
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::agent::{BlkioStats, CpuUsage, PidsStats, ThrottlingData};

    use super::*;

    fn entry(major: u64, op: &str, value: u64) -> BlkioStatsEntry {
        BlkioStatsEntry { major, op: op.into(), value, ..Default::default() }
    }

    fn guest() -> StatsContainerResponse {
        let cpu = CpuStats {
            cpu_usage: MessageField::some(CpuUsage {
                total_usage: 9_000_000,
                usage_in_kernelmode: 2_000_000,
                usage_in_usermode: 7_000_000,
                ..Default::default()
            }),
            throttling_data: MessageField::some(ThrottlingData {
                periods: 5,
                throttled_periods: 3,
                throttled_time: 4_000,
                ..Default::default()
            }),
            ..Default::default()
        };
        let usage = MemoryData { usage: 100, limit: 200, max_usage: 150, ..Default::default() };
        let memory = MemoryStats {
            usage: MessageField::some(usage),
            stats: [("anon", 60), ("file", 40), ("inactive_file", 30), ("pgfault", 8)]
                .map(|(k, v)| (k.to_owned(), v))
                .into(),
            ..Default::default()
        };
        let io_service_bytes_recursive = vec![
            entry(253, "read", 10),
            entry(253, "write", 20),
            entry(253, "rios", 1),
            entry(8, "write", 5),
        ];
        let blkio = BlkioStats {
            io_service_bytes_recursive,
            io_serviced_recursive: vec![entry(8, "Write", 2)],
            ..Default::default()
        };
        let cgroup = CgroupStats {
            cpu_stats: MessageField::some(cpu),
            memory_stats: MessageField::some(memory),
            pids_stats: MessageField::some(PidsStats { current: 4, limit: 64, ..Default::default() }),
            blkio_stats: MessageField::some(blkio),
            ..Default::default()
        };
        StatsContainerResponse { cgroup_stats: MessageField::some(cgroup), ..Default::default() }
    }

    #[test]
    fn a_v1_host_gets_nanoseconds_and_totals() {
        let any = metrics(&guest(), Version::V1).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v1.Metrics");
        let metrics = v1::Metrics::parse_from_bytes(&any.value).unwrap();
        let cpu = &metrics.cpu.usage;
        assert_eq!((cpu.total, cpu.kernel, cpu.user), (9_000_000, 2_000_000, 7_000_000));
        assert_eq!(metrics.cpu.throttling.throttled_time, 4_000);
        let memory = &metrics.memory;
        assert_eq!((memory.usage.usage, memory.usage.limit, memory.usage.max), (100, 200, 150));
        assert_eq!((memory.rss, memory.total_rss, memory.cache, memory.total_cache), (60, 60, 40, 40));
        // kubelet's working set is usage less this.
        assert_eq!(memory.total_inactive_file, 30);
        assert_eq!((metrics.pids.current, metrics.pids.limit), (4, 64));
    }

    #[test]
    fn a_v2_host_gets_microseconds_and_an_entry_a_device() {
        let any = metrics(&guest(), Version::V2).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = v2::Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(
            (metrics.cpu.usage_usec, metrics.cpu.user_usec, metrics.cpu.system_usec),
            (9_000, 7_000, 2_000)
        );
        assert_eq!((metrics.cpu.nr_periods, metrics.cpu.nr_throttled, metrics.cpu.throttled_usec), (5, 3, 4));
        assert_eq!((metrics.memory.anon, metrics.memory.file, metrics.memory.inactive_file), (60, 40, 30));
        assert_eq!((metrics.memory.usage, metrics.memory.usage_limit), (100, 200));
        let io: Vec<_> =
            metrics.io.usage.iter().map(|e| (e.major, e.rbytes, e.wbytes, e.rios, e.wios)).collect();
        assert_eq!(io, [(8, 0, 5, 0, 2), (253, 10, 20, 1, 0)]);
    }

    #[test]
    fn a_guest_with_v1_names_is_understood_too() {
        let mut stats = guest();
        let memory = stats.cgroup_stats.mut_or_insert_default().memory_stats.mut_or_insert_default();
        memory.stats =
            [("rss", 1), ("total_rss", 2), ("total_inactive_file", 3)].map(|(k, v)| (k.to_owned(), v)).into();
        let metrics = v1::Metrics::parse_from_bytes(&metrics(&stats, Version::V1).unwrap().value).unwrap();
        assert_eq!(
            (metrics.memory.rss, metrics.memory.total_rss, metrics.memory.total_inactive_file),
            (1, 2, 3)
        );
    }
}
