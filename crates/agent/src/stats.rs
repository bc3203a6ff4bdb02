//! A container's figures, from the executor's terms to the wire's.
//!
//! The wire was made for cgroup v1. For v2 its users expect: no limit as the largest number (for pids as 0), swap counted
//! by itself, and all block I/O figures in one list, told apart by their operation.

use bulkhead_executor::{CpuStats, IoStats, MemoryStats, PidsStats, Stats};
use bulkhead_protocol::agent;
use bulkhead_protocol::protobuf::MessageField;

use crate::error::{During, Result};

/// The figures as a response carries them.
pub(crate) fn to_wire(stats: Stats) -> agent::CgroupStats {
    let hugetlb = stats.hugetlb.into_iter().map(|pages| {
        let figures =
            agent::HugetlbStats { usage: pages.usage, failcnt: pages.failures, ..Default::default() };
        (pages.page_size, figures)
    });
    agent::CgroupStats {
        cpu_stats: MessageField::some(cpu(&stats.cpu)),
        memory_stats: stats.memory.map(memory).into(),
        pids_stats: stats.pids.map(pids).into(),
        blkio_stats: MessageField::some(agent::BlkioStats {
            io_service_bytes_recursive: stats.io.iter().flat_map(io).collect(),
            ..Default::default()
        }),
        hugetlb_stats: hugetlb.collect(),
        ..Default::default()
    }
}

/// The figures of the guest's network interfaces, which all its containers share.
pub(crate) fn network() -> Result<Vec<agent::NetworkStats>> {
    const FILE: &str = "/proc/thread-self/net/dev";
    let text = std::fs::read_to_string(FILE).during(|| format!("read {FILE}"))?;
    Ok(text.lines().filter_map(interface).filter(|interface| interface.name != "lo").collect())
}

/// A line of `/proc/net/dev`: the name, eight figures of what came in, eight of what went out.
fn interface(line: &str) -> Option<agent::NetworkStats> {
    let (name, figures) = line.split_once(':')?;
    let figures: Vec<u64> = figures.split_whitespace().map_while(|figure| figure.parse().ok()).collect();
    let [
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        _,
        _,
        _,
        _,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
        ..,
    ] = *figures
    else {
        return None;
    };
    Some(agent::NetworkStats {
        name: name.trim().to_owned(),
        rx_bytes,
        rx_packets,
        rx_errors,
        rx_dropped,
        tx_bytes,
        tx_packets,
        tx_errors,
        tx_dropped,
        ..Default::default()
    })
}

fn cpu(cpu: &CpuStats) -> agent::CpuStats {
    agent::CpuStats {
        cpu_usage: MessageField::some(agent::CpuUsage {
            total_usage: cpu.usage_ns,
            usage_in_kernelmode: cpu.system_ns,
            usage_in_usermode: cpu.user_ns,
            ..Default::default()
        }),
        throttling_data: MessageField::some(agent::ThrottlingData {
            periods: cpu.periods,
            throttled_periods: cpu.throttled_periods,
            throttled_time: cpu.throttled_ns,
            ..Default::default()
        }),
        ..Default::default()
    }
}

fn memory(memory: MemoryStats) -> agent::MemoryStats {
    let stat = |key: &str| memory.stat.get(key).copied().unwrap_or_default();
    let data = |usage, limit: Option<u64>| agent::MemoryData {
        usage,
        limit: limit.unwrap_or(u64::MAX),
        ..Default::default()
    };
    agent::MemoryStats {
        cache: stat("file"),
        usage: MessageField::some(agent::MemoryData {
            max_usage: memory.peak.unwrap_or_default(),
            failcnt: memory.events.get("max").copied().unwrap_or_default(),
            ..data(memory.usage, memory.limit)
        }),
        swap_usage: memory.swap_usage.map(|usage| data(usage, memory.swap_limit)).into(),
        kernel_usage: MessageField::some(data(stat("kernel"), None)),
        use_hierarchy: true,
        stats: memory.stat.into_iter().collect(),
        ..Default::default()
    }
}

fn pids(pids: PidsStats) -> agent::PidsStats {
    agent::PidsStats { current: pids.current, limit: pids.limit.unwrap_or(0), ..Default::default() }
}

fn io(device: &IoStats) -> impl Iterator<Item = agent::BlkioStatsEntry> {
    let (major, minor) = (device.major, device.minor);
    [
        ("read", device.read_bytes),
        ("write", device.written_bytes),
        ("rios", device.reads),
        ("wios", device.writes),
        ("dbytes", device.discarded_bytes),
        ("dios", device.discards),
    ]
    .into_iter()
    .map(move |(op, value)| agent::BlkioStatsEntry {
        major,
        minor,
        op: op.into(),
        value,
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use bulkhead_executor::HugetlbStats;

    use super::*;

    #[test]
    fn every_figure_arrives_where_it_belongs() {
        let stats = Stats {
            cpu: CpuStats {
                usage_ns: 5,
                user_ns: 3,
                system_ns: 2,
                periods: 7,
                throttled_periods: 4,
                throttled_ns: 9,
            },
            memory: Some(MemoryStats {
                usage: 100,
                peak: Some(200),
                limit: None,
                swap_usage: Some(10),
                swap_limit: Some(20),
                stat: [("file".to_owned(), 30), ("kernel".to_owned(), 6)].into(),
                events: [("max".to_owned(), 8)].into(),
            }),
            pids: Some(PidsStats { current: 2, limit: None }),
            io: vec![IoStats { major: 254, minor: 1, read_bytes: 11, writes: 12, ..Default::default() }],
            hugetlb: vec![HugetlbStats { page_size: "2MB".into(), usage: 1, limit: None, failures: 3 }],
        };
        let wire = to_wire(stats);
        let usage = &wire.cpu_stats.cpu_usage;
        assert_eq!((usage.total_usage, usage.usage_in_usermode, usage.usage_in_kernelmode), (5, 3, 2));
        let throttling = &wire.cpu_stats.throttling_data;
        assert_eq!((throttling.periods, throttling.throttled_periods, throttling.throttled_time), (7, 4, 9));
        let memory = &wire.memory_stats;
        assert_eq!((memory.cache, memory.kernel_usage.usage, memory.stats["file"]), (30, 6, 30));
        assert_eq!((memory.usage.usage, memory.usage.max_usage, memory.usage.failcnt), (100, 200, 8));
        assert_eq!(
            (memory.usage.limit, memory.swap_usage.usage, memory.swap_usage.limit),
            (u64::MAX, 10, 20)
        );
        assert_eq!((wire.pids_stats.current, wire.pids_stats.limit), (2, 0));
        let io = &wire.blkio_stats.io_service_bytes_recursive;
        let value = |op: &str| {
            io.iter().find(|entry| entry.op == op).map(|entry| (entry.major, entry.minor, entry.value))
        };
        assert_eq!((value("read"), value("wios")), (Some((254, 1, 11)), Some((254, 1, 12))));
        assert_eq!((wire.hugetlb_stats["2MB"].usage, wire.hugetlb_stats["2MB"].failcnt), (1, 3));
    }

    #[test]
    fn an_interface_is_a_line() {
        let line = "  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16";
        let figures = interface(line).unwrap();
        assert_eq!((figures.name.as_str(), figures.rx_bytes, figures.rx_dropped), ("eth0", 1, 4));
        assert_eq!((figures.tx_bytes, figures.tx_packets, figures.tx_dropped), (9, 10, 12));
        for line in ["face |bytes packets", "  eth0: 1 2 3", "", "a: b"] {
            assert!(interface(line).is_none(), "{line:?}");
        }
    }

    #[test]
    fn what_has_no_controller_is_absent() {
        let wire = to_wire(Stats::default());
        assert!(wire.memory_stats.is_none() && wire.pids_stats.is_none());
    }
}
