//! From OCI resources to the values of cgroup v2 files: pure.
//!
//! The wire does not tell 0 from absent: 0 leaves a value as it is, -1 takes a limit away. What version 2 has no file for
//! is an error where the container would get more than it should, and left out where it only asks for a preference (as
//! runc does): swappiness, kernel memory, which is counted as memory anyway, and to be spared by the OOM killer.

use std::{fs, path::Path};

use bulkhead_protocol::oci::{LinuxBlockIO, LinuxCPU, LinuxMemory, LinuxResources, LinuxThrottleDevice};

use crate::Error;

/// A value for a file of the cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Setting {
    /// The file's name.
    pub(super) file: String,
    /// What is written to it.
    pub(super) value: String,
}

impl Setting {
    fn new(file: impl Into<String>, value: impl ToString) -> Setting {
        Setting { file: file.into(), value: value.to_string() }
    }

    /// Whether it keeps a container from anything here: a weight only arbitrates between containers, no limit is no
    /// limit, and what the machine has nothing of needs none.
    pub(super) fn is_limit(&self, supply: &Supply) -> bool {
        let value = self.value.as_str();
        if self.file.ends_with(".weight") || value.starts_with("max") || value.ends_with("=max") {
            return false;
        }
        if self.file == "memory.swap.max" {
            return supply.swap && value != "0";
        }
        match self.file.strip_prefix("hugetlb.") {
            Some(rest) => supply.pages.iter().any(|size| rest.split('.').next() == Some(size)),
            None => true,
        }
    }
}

/// What some machines have nothing of.
#[derive(Clone, Debug, Default)]
pub(super) struct Supply {
    /// The kernel can swap.
    swap: bool,
    /// The sizes that there are huge pages of, in the words of the cgroup's files: `2MB`.
    pages: Vec<String>,
}

impl Supply {
    /// That of this machine.
    pub(super) fn here() -> Supply {
        let pools = fs::read_dir("/sys/kernel/mm/hugepages").into_iter().flatten().flatten();
        let has_some = |pool: &Path| {
            ["nr_hugepages", "nr_overcommit_hugepages"]
                .iter()
                .any(|file| fs::read_to_string(pool.join(file)).is_ok_and(|number| number.trim() != "0"))
        };
        let pages = pools
            .filter(|pool| has_some(&pool.path()))
            .filter_map(|pool| page_size(pool.file_name().to_str()?))
            .collect();
        Supply { swap: Path::new("/proc/swaps").exists(), pages }
    }
}

/// The size in the name of a pool, `hugepages-2048kB`.
fn page_size(pool: &str) -> Option<String> {
    let size: u64 = pool.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()?;
    Some(match size {
        1_048_576.. => format!("{}GB", size >> 20),
        1024.. => format!("{}MB", size >> 10),
        _ => format!("{size}KB"),
    })
}

/// The limits among the settings, for a machine that can set none.
pub(super) fn limits(resources: &LinuxResources, supply: &Supply) -> Result<Vec<String>, Error> {
    let settings = settings(resources, &|_| None)?;
    Ok(settings.into_iter().filter(|setting| setting.is_limit(supply)).map(|s| s.file).collect())
}

/// What `resources` ask for, in the order to write it. `read` returns the present value of a file, if there is one.
pub(super) fn settings(
    resources: &LinuxResources,
    read: &dyn Fn(&str) -> Option<String>,
) -> Result<Vec<Setting>, Error> {
    let mut settings = Vec::new();
    if let Some(cpu) = resources.CPU.as_ref() {
        self::cpu(cpu, read, &mut settings)?;
    }
    if let Some(memory) = resources.Memory.as_ref() {
        self::memory(memory, read, &mut settings)?;
    }
    if let Some(pids) = resources.Pids.as_ref()
        && pids.Limit != 0
    {
        settings.push(Setting::new("pids.max", limit(pids.Limit)));
    }
    if let Some(io) = resources.BlockIO.as_ref() {
        block_io(io, read, &mut settings)?;
    }
    for page in &resources.HugepageLimits {
        if page.Pagesize.is_empty() || !page.Pagesize.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(Error::Invalid(format!("huge page size {:?}", page.Pagesize)));
        }
        for kind in ["", ".rsvd"] {
            let file = format!("hugetlb.{}{kind}.max", page.Pagesize);
            if kind.is_empty() || read(&file).is_some() {
                settings.push(Setting::new(file, page.Limit));
            }
        }
    }
    if let Some(network) = resources.Network.as_ref()
        && (network.ClassID != 0 || !network.Priorities.is_empty())
    {
        return unsupported("network classes and priorities: cgroup v2 has none");
    }
    Ok(settings)
}

fn unsupported<T>(what: &str) -> Result<T, Error> {
    Err(Error::Unsupported(what.to_owned()))
}

fn limit(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

fn cpu(
    cpu: &LinuxCPU,
    read: &dyn Fn(&str) -> Option<String>,
    settings: &mut Vec<Setting>,
) -> Result<(), Error> {
    if cpu.RealtimeRuntime != 0 || cpu.RealtimePeriod != 0 {
        return unsupported("real-time processor limits: cgroup v2 has none");
    }
    if cpu.Shares != 0 {
        settings.push(Setting::new("cpu.weight", weight(cpu.Shares)));
    }
    if cpu.Quota != 0 || cpu.Period != 0 {
        let now = read("cpu.max").unwrap_or_default();
        let (quota_now, period_now) = now.trim().split_once(' ').unwrap_or(("max", "100000"));
        let quota = if cpu.Quota == 0 { quota_now.to_owned() } else { limit(cpu.Quota) };
        let period = if cpu.Period == 0 { period_now.to_owned() } else { cpu.Period.to_string() };
        if quota != "max" || period != "100000" || !now.is_empty() {
            settings.push(Setting::new("cpu.max", format!("{quota} {period}")));
        }
    }
    for (file, list) in [("cpuset.cpus", &cpu.Cpus), ("cpuset.mems", &cpu.Mems)] {
        if !list.is_empty() {
            settings.push(Setting::new(file, list));
        }
    }
    Ok(())
}

/// Shares 2..=262144 of version 1 onto weights 1..=10000 of version 2, linearly, as Kubernetes and runc do.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

fn memory(
    memory: &LinuxMemory,
    read: &dyn Fn(&str) -> Option<String>,
    settings: &mut Vec<Setting>,
) -> Result<(), Error> {
    if memory.Kernel > 0 || memory.KernelTCP > 0 || memory.Swappiness != 0 {
        tracing::debug!("cgroup v2 has no kernel memory limits and no swappiness: ignored");
    }
    if memory.DisableOOMKiller {
        tracing::warn!("the OOM killer cannot be disabled with cgroup v2: ignored");
    }
    if memory.Swap != 0 {
        settings.push(Setting::new("memory.swap.max", swap(memory, read)?));
    }
    if memory.Limit != 0 {
        settings.push(Setting::new("memory.max", limit(memory.Limit)));
    }
    if memory.Reservation != 0 {
        settings.push(Setting::new("memory.low", limit(memory.Reservation)));
    }
    Ok(())
}

/// OCI's swap is memory and swap together, cgroup v2's is swap alone.
fn swap(memory: &LinuxMemory, read: &dyn Fn(&str) -> Option<String>) -> Result<String, Error> {
    if memory.Swap < 0 {
        return Ok("max".to_owned());
    }
    let limit = match memory.Limit {
        0 => read("memory.max").and_then(|text| text.trim().parse().ok()),
        limit => Some(limit),
    };
    match limit {
        Some(limit) if (0..=memory.Swap).contains(&limit) => Ok((memory.Swap - limit).to_string()),
        Some(limit) if limit > 0 => Err(Error::Invalid(format!(
            "memory and swap together ({}) are less than memory alone ({limit})",
            memory.Swap
        ))),
        _ => Err(Error::Invalid("a swap limit needs a memory limit".to_owned())),
    }
}

fn block_io(
    io: &LinuxBlockIO,
    read: &dyn Fn(&str) -> Option<String>,
    settings: &mut Vec<Setting>,
) -> Result<(), Error> {
    if io.LeafWeight != 0 || io.WeightDevice.iter().any(|d| d.LeafWeight != 0) {
        return unsupported("block I/O leaf weights: cgroup v2 has none");
    }
    // The BFQ scheduler takes 1..=1000 as OCI does, the general controller 1..=10000.
    let bfq = read("io.bfq.weight").is_some();
    let file = if bfq { "io.bfq.weight" } else { "io.weight" };
    let weight = |weight: u32| match weight {
        10..=1000 if bfq => Ok(weight),
        10..=1000 => Ok(1 + (weight - 10) * 9999 / 990),
        _ => Err(Error::Invalid(format!("block I/O weight {weight} is not within 10..=1000"))),
    };
    if io.Weight != 0 {
        settings.push(Setting::new(file, weight(io.Weight)?));
    }
    for device in &io.WeightDevice {
        let value = format!("{}:{} {}", device.Major, device.Minor, weight(device.Weight)?);
        settings.push(Setting::new(file, value));
    }
    let throttles: [(&str, &[LinuxThrottleDevice]); 4] = [
        ("rbps", &io.ThrottleReadBpsDevice),
        ("wbps", &io.ThrottleWriteBpsDevice),
        ("riops", &io.ThrottleReadIOPSDevice),
        ("wiops", &io.ThrottleWriteIOPSDevice),
    ];
    for (key, devices) in throttles {
        for device in devices {
            let rate = if device.Rate == 0 { "max".to_owned() } else { device.Rate.to_string() };
            settings.push(Setting::new("io.max", format!("{}:{} {key}={rate}", device.Major, device.Minor)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use bulkhead_protocol::oci::{LinuxHugepageLimit, LinuxWeightDevice};

    use super::*;

    fn plan(change: impl FnOnce(&mut LinuxResources), now: &[(&str, &str)]) -> Result<Vec<String>, String> {
        let mut resources = LinuxResources::new();
        change(&mut resources);
        let read = |file: &str| now.iter().find(|(name, _)| *name == file).map(|(_, v)| (*v).to_owned());
        settings(&resources, &read)
            .map(|list| list.into_iter().map(|s| format!("{}={}", s.file, s.value)).collect())
            .map_err(|e| e.to_string())
    }

    fn cpu(change: impl FnOnce(&mut LinuxCPU), now: &[(&str, &str)]) -> Result<Vec<String>, String> {
        plan(|r| change(r.CPU.mut_or_insert_default()), now)
    }

    fn memory(limit: i64, swap: i64, now: &[(&str, &str)]) -> Result<Vec<String>, String> {
        plan(
            |r| {
                let memory = r.Memory.mut_or_insert_default();
                (memory.Limit, memory.Swap) = (limit, swap);
            },
            now,
        )
    }

    #[test]
    fn shares_become_a_weight() {
        for (shares, weight) in [(1, 1), (2, 1), (1024, 39), (262_144, 10_000), (u64::MAX, 10_000)] {
            assert_eq!(cpu(|c| c.Shares = shares, &[]).unwrap(), [format!("cpu.weight={weight}")]);
        }
    }

    #[test]
    fn quota_and_period_keep_what_is_not_given() {
        let now = [("cpu.max", "5000 20000\n")];
        assert_eq!(cpu(|c| c.Quota = 50_000, &[]).unwrap(), ["cpu.max=50000 100000"]);
        assert_eq!(cpu(|c| c.Quota = 10_000, &now).unwrap(), ["cpu.max=10000 20000"]);
        assert_eq!(cpu(|c| c.Period = 40_000, &now).unwrap(), ["cpu.max=5000 40000"]);
        assert_eq!(cpu(|c| c.Quota = -1, &now).unwrap(), ["cpu.max=max 20000"]);
        assert_eq!(
            cpu(
                |c| {
                    c.Cpus = "0-1".into();
                    c.Mems = "0".into();
                },
                &[]
            )
            .unwrap(),
            ["cpuset.cpus=0-1", "cpuset.mems=0"]
        );
    }

    #[test]
    fn swap_is_what_remains_beside_memory() {
        assert_eq!(memory(100, 300, &[]).unwrap(), ["memory.swap.max=200", "memory.max=100"]);
        assert_eq!(memory(100, 100, &[]).unwrap(), ["memory.swap.max=0", "memory.max=100"]);
        assert_eq!(memory(-1, -1, &[]).unwrap(), ["memory.swap.max=max", "memory.max=max"]);
        assert_eq!(memory(0, 300, &[("memory.max", "100\n")]).unwrap(), ["memory.swap.max=200"]);
        assert_eq!(memory(100, 0, &[]).unwrap(), ["memory.max=100"]);
        assert!(memory(0, 300, &[("memory.max", "max\n")]).unwrap_err().contains("needs a memory limit"));
        assert!(memory(-1, 300, &[]).unwrap_err().contains("needs a memory limit"));
        assert!(memory(200, 100, &[]).unwrap_err().contains("less than memory alone"));
    }

    #[test]
    fn pids_pages_and_block_io() {
        assert_eq!(plan(|r| r.Pids.mut_or_insert_default().Limit = 7, &[]).unwrap(), ["pids.max=7"]);
        assert_eq!(plan(|r| r.Pids.mut_or_insert_default().Limit = -1, &[]).unwrap(), ["pids.max=max"]);
        let page = LinuxHugepageLimit { Pagesize: "2MB".into(), Limit: 5, ..Default::default() };
        assert_eq!(plan(|r| r.HugepageLimits.push(page.clone()), &[]).unwrap(), ["hugetlb.2MB.max=5"]);
        assert_eq!(
            plan(|r| r.HugepageLimits.push(page), &[("hugetlb.2MB.rsvd.max", "max")]).unwrap(),
            ["hugetlb.2MB.max=5", "hugetlb.2MB.rsvd.max=5"]
        );
        let io = |r: &mut LinuxResources| {
            let io = r.BlockIO.mut_or_insert_default();
            io.Weight = 1000;
            io.WeightDevice.push(LinuxWeightDevice { Major: 8, Minor: 16, Weight: 10, ..Default::default() });
            let device = |rate| LinuxThrottleDevice { Major: 8, Minor: 0, Rate: rate, ..Default::default() };
            io.ThrottleReadBpsDevice.push(device(9));
            io.ThrottleWriteIOPSDevice.push(device(0));
        };
        let max = ["io.max=8:0 rbps=9", "io.max=8:0 wiops=max"];
        assert_eq!(plan(io, &[]).unwrap(), [&["io.weight=10000", "io.weight=8:16 1"][..], &max].concat());
        assert_eq!(
            plan(io, &[("io.bfq.weight", "default 100")]).unwrap(),
            [&["io.bfq.weight=1000", "io.bfq.weight=8:16 10"][..], &max].concat()
        );
    }

    #[test]
    fn what_cgroup_v2_lacks_is_an_error() {
        assert!(cpu(|c| c.RealtimeRuntime = 1, &[]).is_err());
        assert!(cpu(|c| c.RealtimePeriod = 1, &[]).is_err());
        assert!(plan(|r| r.BlockIO.mut_or_insert_default().LeafWeight = 1, &[]).is_err());
        assert!(plan(|r| r.BlockIO.mut_or_insert_default().Weight = 1001, &[]).is_err());
        assert!(plan(|r| r.Network.mut_or_insert_default().ClassID = 1, &[]).is_err());
        let page = LinuxHugepageLimit { Pagesize: "../x".into(), ..Default::default() };
        assert!(plan(|r| r.HugepageLimits.push(page), &[]).is_err());
    }

    #[test]
    fn what_only_asks_for_a_preference_is_ignored() {
        let memory = |r: &mut LinuxResources| {
            let memory = r.Memory.mut_or_insert_default();
            (memory.Kernel, memory.KernelTCP, memory.Swappiness) = (1 << 20, 1 << 20, 60);
            memory.DisableOOMKiller = true;
            memory.Limit = 100;
        };
        assert_eq!(plan(memory, &[]).unwrap(), ["memory.max=100"]);
    }

    #[test]
    fn without_cgroups_only_limits_matter() {
        let limits = |resources: &LinuxResources| limits(resources, &Supply::default()).unwrap();
        let mut resources = LinuxResources::new();
        let cpu = resources.CPU.mut_or_insert_default();
        (cpu.Shares, cpu.Period, cpu.Quota) = (2, 50_000, -1);
        let memory = resources.Memory.mut_or_insert_default();
        (memory.Limit, memory.Swap, memory.Swappiness) = (-1, -1, 60);
        let io = resources.BlockIO.mut_or_insert_default();
        io.ThrottleReadBpsDevice.push(LinuxThrottleDevice { Major: 8, ..Default::default() });
        assert!(limits(&resources).is_empty(), "{:?}", limits(&resources));
        resources.Memory.mut_or_insert_default().Limit = 1;
        resources.CPU.mut_or_insert_default().Quota = 1;
        assert_eq!(limits(&resources), ["cpu.max", "memory.max"]);
    }

    #[test]
    fn what_the_machine_has_nothing_of_needs_no_limit() {
        let supply =
            |swap, pages: &[&str]| Supply { swap, pages: pages.iter().map(|p| (*p).into()).collect() };
        let is_limit = |file: &str, value: u64, supply: &Supply| Setting::new(file, value).is_limit(supply);
        // A container engine limits every page size that the host has.
        assert!(!is_limit("hugetlb.1GB.max", 0, &supply(true, &["2MB"])));
        assert!(is_limit("hugetlb.2MB.max", 0, &supply(true, &["2MB"])));
        assert!(is_limit("hugetlb.2MB.rsvd.max", 0, &supply(true, &["2MB"])));
        assert!(!is_limit("memory.swap.max", 0, &supply(true, &[])));
        assert!(!is_limit("memory.swap.max", 4096, &supply(false, &[])));
        assert!(is_limit("memory.swap.max", 4096, &supply(true, &[])));
        assert!(is_limit("memory.max", 0, &Supply::default()) && is_limit("pids.max", 5, &Supply::default()));
        let sizes = ["hugepages-64kB", "hugepages-2048kB", "hugepages-1048576kB", "other"].map(page_size);
        assert_eq!(sizes, ["64KB", "2MB", "1GB", ""].map(|s| (!s.is_empty()).then(|| s.to_owned())));
    }
}
