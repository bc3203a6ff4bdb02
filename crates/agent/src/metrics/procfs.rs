//! What files of /proc tell: proc(5). A line that is not as expected is left out.

use super::{Sample, number};

/// USER_HZ, part of the kernel's interface.
const TICKS: f64 = 100.0;

const CPU: [&str; 10] =
    ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice"];
const NETDEV: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
const DISK: [&str; 17] = [
    "reads",
    "merged",
    "sectors_read",
    "time_reading",
    "writes",
    "writes_merged",
    "sectors_written",
    "time_writing",
    "in_progress",
    "time_in_progress",
    "weighted_time_in_progress",
    "discards",
    "discards_merged",
    "sectors_discarded",
    "time_discarding",
    "flushes",
    "time_flushing",
];
const STATUS: [&str; 18] = [
    "vmpeak",
    "vmsize",
    "vmlck",
    "vmpin",
    "vmhwm",
    "vmrss",
    "rssanon",
    "rssfile",
    "rssshmem",
    "vmdata",
    "vmstk",
    "vmexe",
    "vmlib",
    "vmpte",
    "vmswap",
    "hugetlbpages",
    "voluntary_ctxt_switches",
    "nonvoluntary_ctxt_switches",
];
const IO: [&str; 7] =
    ["rchar", "wchar", "syscr", "syscw", "read_bytes", "write_bytes", "cancelled_write_bytes"];

/// `/proc/self/stat`.
pub(super) struct Stat {
    /// utime, stime, cutime, cstime.
    times: [f64; 4],
    pub(super) threads: f64,
    /// Seconds from the machine's start to the process'.
    pub(super) start: f64,
    pub(super) virtual_bytes: f64,
    pub(super) resident_bytes: f64,
}

impl Stat {
    /// The fields are counted from behind the command, which may hold anything.
    pub(super) fn parse(stat: &str) -> Option<Stat> {
        let (_, rest) = stat.rsplit_once(") ")?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3).and_then(|field| figure(field));
        Some(Stat {
            times: [field(14)?, field(15)?, field(16)?, field(17)?],
            threads: field(20)?,
            start: field(22)? / TICKS,
            virtual_bytes: field(23)?,
            resident_bytes: field(24)? * number(rustix::param::page_size() as u64),
        })
    }

    /// Processor time of the process in seconds.
    pub(super) fn seconds(&self) -> f64 {
        let [user, system, ..] = self.times;
        (user + system) / TICKS
    }

    /// Processor times in ticks.
    pub(super) fn items(&self) -> Vec<Sample> {
        ["utime", "stime", "cutime", "cstime"]
            .into_iter()
            .zip(self.times)
            .map(|(name, ticks)| Sample::item(name, ticks))
            .collect()
    }
}

/// A finite number, as the kernel writes them.
fn figure(text: &str) -> Option<f64> {
    text.parse().ok().filter(|value: &f64| value.is_finite())
}

/// `name: value unit` lines.
fn pairs(text: &str) -> impl Iterator<Item = (&str, f64, Option<&str>)> {
    text.lines().filter_map(|line| {
        let (name, rest) = line.split_once(':')?;
        let mut words = rest.split_whitespace();
        Some((name.trim(), figure(words.next()?)?, words.next()))
    })
}

fn chosen(text: &str, names: &[&str]) -> Vec<Sample> {
    pairs(text)
        .map(|(name, value, _)| (name.to_ascii_lowercase(), value))
        .filter(|(name, _)| names.contains(&name.as_str()))
        .map(|(name, value)| Sample::item(name, value))
        .collect()
}

/// `/proc/self/status`; sizes in KiB.
pub(super) fn status(text: &str) -> Vec<Sample> {
    chosen(text, &STATUS)
}

/// `/proc/self/io`.
pub(super) fn io(text: &str) -> Vec<Sample> {
    chosen(text, &IO)
}

/// `/proc/loadavg`: the averages.
pub(super) fn load(text: &str) -> Vec<Sample> {
    let values = text.split_whitespace().map_while(figure);
    ["load1", "load5", "load15"]
        .into_iter()
        .zip(values)
        .map(|(name, value)| Sample::item(name, value))
        .collect()
}

/// `/proc/loadavg`: what runs of what is there.
pub(super) fn tasks(text: &str) -> Vec<Sample> {
    let counts = text.split_whitespace().nth(3).and_then(|tasks| tasks.split_once('/'));
    match counts.map(|(current, all)| (figure(current), figure(all))) {
        Some((Some(current), Some(all))) => vec![Sample::item("cur", current), Sample::item("max", all)],
        _ => Vec::new(),
    }
}

/// `/proc/stat`: the time of each processor and of all, in ticks.
pub(super) fn cpu(text: &str) -> Vec<Sample> {
    let mut samples = Vec::new();
    for line in text.lines() {
        let Some((name, rest)) = line.strip_prefix("cpu").and_then(|line| line.split_once(' ')) else {
            continue;
        };
        let name = if name.is_empty() { "total" } else { name };
        for (item, value) in CPU.into_iter().zip(rest.split_whitespace().map_while(figure)) {
            samples.push(Sample { labels: vec![("cpu", name.into()), ("item", item.into())], value });
        }
    }
    samples
}

/// `/proc/stat`: when the machine was started, in seconds since the epoch.
pub(super) fn boot_time(text: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix("btime ")).and_then(|time| figure(time.trim()))
}

/// `/proc/vmstat`, all of it.
pub(super) fn vmstat(text: &str) -> Vec<Sample> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .filter_map(|(name, value)| Some(Sample::item(name, figure(value.trim())?)))
        .collect()
}

/// `/proc/net/dev`.
pub(super) fn netdev(text: &str) -> Vec<Sample> {
    let mut samples = Vec::new();
    for line in text.lines() {
        // An interface may have a colon in its name, a figure has none.
        let Some((interface, rest)) = line.rsplit_once(':') else { continue };
        for (item, value) in NETDEV.into_iter().zip(rest.split_whitespace().map_while(figure)) {
            let labels = vec![("interface", interface.trim().to_owned()), ("item", item.to_owned())];
            samples.push(Sample { labels, value });
        }
    }
    samples
}

/// `/proc/diskstats`.
pub(super) fn diskstats(text: &str) -> Vec<Sample> {
    let mut samples = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace().skip(2);
        let Some(disk) = words.next() else { continue };
        for (item, value) in DISK.into_iter().zip(words.map_while(figure)) {
            samples
                .push(Sample { labels: vec![("disk", disk.to_owned()), ("item", item.to_owned())], value });
        }
    }
    samples
}

/// `/proc/meminfo`; sizes in bytes.
pub(super) fn meminfo(text: &str) -> Vec<Sample> {
    pairs(text)
        .map(|(name, value, unit)| {
            Sample::item(memory_item(name), if unit == Some("kB") { value * 1024.0 } else { value })
        })
        .collect()
}

/// `MemTotal` is `mem_total`, `Active(anon)` is `active_anon`; a few have names that no rule gives.
fn memory_item(name: &str) -> String {
    match name {
        "AnonHugePages" => return "anon_hugepages".into(),
        "ShmemHugePages" => return "shmem_hugepages".into(),
        "FileHugePages" => return "file_hugepages".into(),
        "Percpu" => return "per_cpu".into(),
        "Committed_AS" => return "committed_as".into(),
        "NFS_Unstable" => return "nfs_unstable".into(),
        "DirectMap4k" => return "direct_map_4k".into(),
        "DirectMap2M" => return "direct_map_2M".into(),
        "DirectMap4M" => return "direct_map_4M".into(),
        "DirectMap1G" => return "direct_map_1G".into(),
        _ => {}
    }
    if let Some(rest) = name.strip_prefix("HugePages_") {
        return format!("hugepages_{}", rest.to_ascii_lowercase());
    }
    let mut item = String::new();
    for (n, letter) in name.chars().enumerate() {
        match letter {
            ')' => {}
            '(' => item.push('_'),
            capital if capital.is_ascii_uppercase() => {
                if n > 0 && !item.ends_with('_') {
                    item.push('_');
                }
                item.push(capital.to_ascii_lowercase());
            }
            other => item.push(other),
        }
    }
    item
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(samples: &[Sample], labels: &[&str]) -> f64 {
        let of = |sample: &Sample| sample.labels.iter().map(|(_, text)| text.clone()).collect::<Vec<_>>();
        samples.iter().find(|sample| of(sample) == labels).unwrap_or_else(|| panic!("no {labels:?}")).value
    }

    #[test]
    fn process_figures_survive_a_strange_name() {
        let stat = Stat::parse("7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 150 50 3 4 20 0 3 0 900 4096 2 0\n").unwrap();
        assert_eq!((stat.threads, stat.seconds(), stat.start, stat.virtual_bytes), (3.0, 2.0, 9.0, 4096.0));
        assert_eq!(stat.resident_bytes, 2.0 * rustix::param::page_size() as f64);
        assert_eq!(value(&stat.items(), &["cstime"]), 4.0);
        assert!(Stat::parse("7 (x) S 1").is_none() && Stat::parse("").is_none());
    }

    #[test]
    fn each_file_is_read_by_its_columns() {
        let status = status("Name:\tx\nVmRSS:\t    2048 kB\nUid:\t0\t0\nvoluntary_ctxt_switches:\t7\n");
        assert_eq!(
            (status.len(), value(&status, &["vmrss"]), value(&status, &["voluntary_ctxt_switches"])),
            (2, 2048.0, 7.0)
        );
        assert_eq!(value(&io("rchar: 1\ncancelled_write_bytes: 2\nx: 3\n"), &["cancelled_write_bytes"]), 2.0);
        let average = "0.50 0.25 0.10 2/345 6789\n";
        assert_eq!(value(&load(average), &["load15"]), 0.1);
        assert_eq!((value(&tasks(average), &["cur"]), value(&tasks(average), &["max"])), (2.0, 345.0));
        let stat = "cpu  1 2 3 4 5 6 7 8 9 10\ncpu0 1 2 3 4\nintr 5 6\nbtime 1700000000\n";
        let times = cpu(stat);
        assert_eq!(
            (times.len(), value(&times, &["total", "guest_nice"]), value(&times, &["0", "idle"])),
            (14, 10.0, 4.0)
        );
        assert_eq!(boot_time(stat), Some(1_700_000_000.0));
        assert_eq!(value(&vmstat("nr_free_pages 5\nbad\nx y\n"), &["nr_free_pages"]), 5.0);
        let net = "Inter-| Receive | Transmit\n face |bytes |bytes\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n eth0:1: 7\n";
        let net = netdev(net);
        assert_eq!(
            (value(&net, &["eth0", "recv_multicast"]), value(&net, &["eth0", "sent_bytes"])),
            (8.0, 9.0)
        );
        assert_eq!((value(&net, &["eth0:1", "recv_bytes"]), net.len()), (7.0, 17));
        let disks = diskstats(" 254 0 vda 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18\n 8 0 sda 1 2\n 8\n");
        assert_eq!(
            (value(&disks, &["vda", "time_flushing"]), value(&disks, &["sda", "merged"])),
            (17.0, 2.0)
        );
        assert_eq!(disks.len(), 19);
    }

    #[test]
    fn memory_has_the_names_of_the_reference_and_is_in_bytes() {
        for (name, item) in [
            ("MemTotal", "mem_total"),
            ("Active(anon)", "active_anon"),
            ("AnonPages", "anon_pages"),
            ("SReclaimable", "s_reclaimable"),
            ("SUnreclaim", "s_unreclaim"),
            ("KReclaimable", "k_reclaimable"),
            ("KernelStack", "kernel_stack"),
            ("WritebackTmp", "writeback_tmp"),
            ("HugePages_Rsvd", "hugepages_rsvd"),
            ("Hugepagesize", "hugepagesize"),
            ("Hugetlb", "hugetlb"),
            ("VmallocUsed", "vmalloc_used"),
            ("Committed_AS", "committed_as"),
            ("CommitLimit", "commit_limit"),
            ("ShmemPmdMapped", "shmem_pmd_mapped"),
            ("HardwareCorrupted", "hardware_corrupted"),
            ("CmaFree", "cma_free"),
            ("DirectMap2M", "direct_map_2M"),
            ("Percpu", "per_cpu"),
            ("Unevictable", "unevictable"),
            ("", ""),
        ] {
            assert_eq!(memory_item(name), item);
        }
        let memory = meminfo("MemTotal: 4 kB\nHugePages_Total: 3\n:\nx\n");
        assert_eq!((value(&memory, &["mem_total"]), value(&memory, &["hugepages_total"])), (4096.0, 3.0));
    }

    #[test]
    fn strange_content_is_survived() {
        for text in [
            "",
            "\0",
            ":::",
            "cpu",
            "cpu x",
            "cpu0  nan inf",
            "a: b",
            "::1 2",
            " \n \n",
            "1 2 3 /",
            "ü ü ü ü/ü",
            &"9".repeat(1 << 16),
        ] {
            for read in [status, io, load, tasks, cpu, vmstat, netdev, diskstats, meminfo] {
                assert!(read(text).iter().all(|sample| sample.value.is_finite()), "{text:?}");
            }
            assert!(Stat::parse(text).is_none() && boot_time(text).is_none());
        }
    }
}
