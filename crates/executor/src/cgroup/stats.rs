//! What a cgroup has used: the figures of cgroup v2, as exact as the kernel gives them.

use std::{collections::BTreeMap, fs, io, path::Path};

use crate::Error;

/// Exact cgroup v2 figures of a container; all zero (`None` where absent) without a cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Processor time.
    pub cpu: CpuStats,
    /// Memory, `None` where the memory controller is not there.
    pub memory: Option<MemoryStats>,
    /// Processes, `None` where the pids controller is not there.
    pub pids: Option<PidsStats>,
    /// Block I/O, one entry a device that was used.
    pub io: Vec<IoStats>,
    /// Huge pages, one entry a page size.
    pub hugetlb: Vec<HugetlbStats>,
}

/// `cpu.stat`, in nanoseconds (the kernel counts microseconds).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Processor time in total.
    pub usage_ns: u64,
    /// Of it in user mode.
    pub user_ns: u64,
    /// Of it in the kernel.
    pub system_ns: u64,
    /// Enforcement periods that have elapsed.
    pub periods: u64,
    /// Of them, those in which the container was throttled.
    pub throttled_periods: u64,
    /// For how long it was throttled in total.
    pub throttled_ns: u64,
}

/// `memory.*`, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// `memory.current`.
    pub usage: u64,
    /// `memory.peak`; kernels before 5.19 do not have it.
    pub peak: Option<u64>,
    /// `memory.max`, `None` without a limit.
    pub limit: Option<u64>,
    /// `memory.swap.current`; `None` when the kernel does not account swap.
    pub swap_usage: Option<u64>,
    /// `memory.swap.max` (swap alone), `None` without a limit.
    pub swap_limit: Option<u64>,
    /// `memory.stat`: `anon`, `file`, `inactive_file`, `pgfault`, ...
    pub stat: BTreeMap<String, u64>,
    /// `memory.events`: `low`, `high`, `max` (how often the limit was hit), `oom`, `oom_kill`.
    pub events: BTreeMap<String, u64>,
}

/// `pids.*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PidsStats {
    /// Tasks now.
    pub current: u64,
    /// `pids.max`, `None` without a limit.
    pub limit: Option<u64>,
}

/// A line of `io.stat`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Device number, major.
    pub major: u64,
    /// Device number, minor.
    pub minor: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Read operations.
    pub reads: u64,
    /// Write operations.
    pub writes: u64,
    /// Bytes discarded.
    pub discarded_bytes: u64,
    /// Discard operations.
    pub discards: u64,
}

/// `hugetlb.<size>.*`, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HugetlbStats {
    /// The page size in the kernel's words: `2MB`, `1GB`.
    pub page_size: String,
    /// Bytes in use.
    pub usage: u64,
    /// The limit, `None` without one.
    pub limit: Option<u64>,
    /// How often the limit was hit.
    pub failures: u64,
}

/// Reads every figure of the cgroup at `dir`.
pub(crate) fn read(dir: &Path) -> Result<Stats, Error> {
    let file = |name: &str| optional(&dir.join(name));
    Ok(Stats {
        cpu: cpu(&file("cpu.stat")?.unwrap_or_default()),
        memory: memory(&file)?,
        pids: match file("pids.current")? {
            Some(current) => {
                Some(PidsStats { current: number(&current), limit: limit(file("pids.max")?.as_deref()) })
            }
            None => None,
        },
        io: file("io.stat")?.unwrap_or_default().lines().filter_map(io_line).collect(),
        hugetlb: hugetlb(dir)?,
    })
}

fn cpu(text: &str) -> CpuStats {
    let values = keyed(text);
    let get = |key: &str| values.get(key).copied().unwrap_or_default();
    CpuStats {
        usage_ns: get("usage_usec").saturating_mul(1000),
        user_ns: get("user_usec").saturating_mul(1000),
        system_ns: get("system_usec").saturating_mul(1000),
        periods: get("nr_periods"),
        throttled_periods: get("nr_throttled"),
        throttled_ns: get("throttled_usec").saturating_mul(1000),
    }
}

fn memory(file: &impl Fn(&str) -> Result<Option<String>, Error>) -> Result<Option<MemoryStats>, Error> {
    let Some(current) = file("memory.current")? else { return Ok(None) };
    Ok(Some(MemoryStats {
        usage: number(&current),
        peak: file("memory.peak")?.map(|t| number(&t)),
        limit: limit(file("memory.max")?.as_deref()),
        swap_usage: file("memory.swap.current")?.map(|t| number(&t)),
        swap_limit: limit(file("memory.swap.max")?.as_deref()),
        stat: keyed(&file("memory.stat")?.unwrap_or_default()),
        events: keyed(&file("memory.events")?.unwrap_or_default()),
    }))
}

fn hugetlb(dir: &Path) -> Result<Vec<HugetlbStats>, Error> {
    let entries = fs::read_dir(dir).map_err(|source| Error::Cgroup { path: dir.into(), source })?;
    let mut sizes: Vec<String> = entries
        .flatten()
        .filter_map(|e| {
            let name = e.file_name().into_string().ok()?;
            Some(name.strip_prefix("hugetlb.")?.strip_suffix(".current")?.to_owned())
        })
        .filter(|size| !size.contains('.'))
        .collect();
    sizes.sort();
    let one = |page_size: String| {
        let file = |what: &str| optional(&dir.join(format!("hugetlb.{page_size}.{what}")));
        Ok(HugetlbStats {
            usage: number(&file("current")?.unwrap_or_default()),
            limit: limit(file("max")?.as_deref()),
            failures: keyed(&file("events")?.unwrap_or_default()).get("max").copied().unwrap_or_default(),
            page_size,
        })
    };
    sizes.into_iter().map(one).collect()
}

/// `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`
fn io_line(line: &str) -> Option<IoStats> {
    let (device, values) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let mut stats = IoStats { major: major.parse().ok()?, minor: minor.parse().ok()?, ..IoStats::default() };
    for (key, value) in values.split_whitespace().filter_map(|pair| pair.split_once('=')) {
        let Ok(value) = value.parse() else { continue };
        match key {
            "rbytes" => stats.read_bytes = value,
            "wbytes" => stats.written_bytes = value,
            "rios" => stats.reads = value,
            "wios" => stats.writes = value,
            "dbytes" => stats.discarded_bytes = value,
            "dios" => stats.discards = value,
            _ => {}
        }
    }
    Some(stats)
}

/// Lines of `key value`.
pub(super) fn keyed(text: &str) -> BTreeMap<String, u64> {
    text.lines()
        .filter_map(|line| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        })
        .collect()
}

fn number(text: &str) -> u64 {
    text.trim().parse().unwrap_or_default()
}

/// `max` and an absent file are no limit.
fn limit(text: Option<&str>) -> Option<u64> {
    text?.trim().parse().ok()
}

/// Whether there are processes in a cgroup or below.
pub(super) fn is_populated(dir: &Path) -> Result<bool, Error> {
    let events = optional(&dir.join("cgroup.events"))?.unwrap_or_default();
    Ok(keyed(&events).get("populated") == Some(&1))
}

/// A file whose controller may not be enabled.
pub(super) fn optional(path: &Path) -> Result<Option<String>, Error> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Cgroup { path: path.into(), source }),
    }
}

#[cfg(any(test, fuzzing))]
/// Files of anybody.
pub(crate) fn fuzz(text: &str) {
    let file = |_: &str| Ok::<_, Error>(Some(text.to_owned()));
    let _ = (cpu(text), memory(&file), keyed(text), number(text), limit(Some(text)));
    let _: Vec<_> = text.lines().map(io_line).collect();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_read_from_its_file() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            (
                "cpu.stat",
                "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 9\nnr_throttled 3\nthrottled_usec 77\n",
            ),
            ("memory.current", "4096\n"),
            ("memory.peak", "8192\n"),
            ("memory.max", "max\n"),
            ("memory.swap.current", "0\n"),
            ("memory.swap.max", "1048576\n"),
            ("memory.stat", "anon 1\nfile 2\n"),
            ("memory.events", "low 0\nmax 4\noom_kill 1\n"),
            ("pids.current", "3\n"),
            ("pids.max", "64\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n7:1 \n"),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("hugetlb.2MB.max", "4194304\n"),
            ("hugetlb.2MB.events", "max 5\n"),
        ] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let stats = read(dir.path()).unwrap();
        assert_eq!(
            stats.cpu,
            CpuStats {
                usage_ns: 1_500_000,
                user_ns: 1_000_000,
                system_ns: 500_000,
                periods: 9,
                throttled_periods: 3,
                throttled_ns: 77_000
            }
        );
        let memory = stats.memory.unwrap();
        assert_eq!((memory.usage, memory.peak, memory.limit), (4096, Some(8192), None));
        assert_eq!((memory.swap_usage, memory.swap_limit), (Some(0), Some(1 << 20)));
        assert_eq!((memory.stat["file"], memory.events["oom_kill"]), (2, 1));
        assert_eq!(stats.pids, Some(PidsStats { current: 3, limit: Some(64) }));
        assert_eq!(stats.io.len(), 2);
        assert_eq!((stats.io[0].read_bytes, stats.io[0].discards, stats.io[1].minor), (1, 6, 1));
        let page =
            HugetlbStats { page_size: "2MB".into(), usage: 2 << 20, limit: Some(4 << 20), failures: 5 };
        assert_eq!(stats.hugetlb, [page]);
    }

    #[test]
    fn an_absent_controller_is_none_not_zero() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), Stats::default());
    }
}
