//! The figures of GetMetrics in Prometheus' text format, read when they are asked for.
//!
//! Names and labels are those of the protocol's other agents. A figure that cannot be read is left out; nothing here fails.

mod filesystem;
mod procfs;

use std::{
    fmt::Write,
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crate::boot::Times;

/// How the agent is doing.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    times: Times,
    scrapes: Arc<AtomicU64>,
}

/// One figure with its labels.
#[derive(Debug, PartialEq)]
struct Sample {
    labels: Vec<(&'static str, String)>,
    value: f64,
}

impl Sample {
    /// A figure that is the only one of its name.
    fn alone(value: f64) -> Vec<Sample> {
        vec![Sample { labels: Vec::new(), value }]
    }

    /// A figure that is an item of its name.
    fn item(name: impl Into<String>, value: f64) -> Sample {
        Sample { labels: vec![("item", name.into())], value }
    }
}

impl Metrics {
    /// Figures of an agent that reached its milestones then.
    pub(crate) fn new(times: Times) -> Metrics {
        Metrics { times, scrapes: Arc::default() }
    }

    /// All of them as text. Blocks: file systems are asked for their size.
    pub(crate) fn text(&self) -> String {
        let mut text = Text(String::new());
        self.own(&mut text);
        agent(&mut text);
        guest(&mut text);
        text.0
    }

    fn own(&self, text: &mut Text) {
        let stage = |name: &str, time| Sample { labels: vec![("stage", name.into())], value: seconds(time) };
        let listening = self.times.listening.get().map(|time| stage("listening", *time));
        let boot = [stage("started", self.times.started)].into_iter().chain(listening).collect();
        text.gauge("bulkhead_agent_boot_seconds", "Time from the start of the machine.", boot);
        let scrapes = number(self.scrapes.fetch_add(1, Ordering::Relaxed) + 1);
        text.family("kata_agent_scrape_count", "counter", "Reads of these figures.", Sample::alone(scrapes));
    }
}

fn agent(text: &mut Text) {
    let stat = procfs::Stat::parse(&read("/proc/self/stat"));
    if let Some(stat) = stat {
        let boot_time = procfs::boot_time(&read("/proc/stat"));
        let started = boot_time.map(|boot| Sample::alone(boot + stat.start)).unwrap_or_default();
        let cpu = "Total user and system CPU time spent in seconds.";
        text.gauge("kata_agent_threads", "Threads of the agent.", Sample::alone(stat.threads));
        text.gauge(
            "kata_agent_total_time",
            "Seconds of processor time of the agent.",
            Sample::alone(stat.seconds()),
        );
        text.gauge(
            "kata_agent_total_vm",
            "Bytes of address space of the agent.",
            Sample::alone(stat.virtual_bytes),
        );
        text.gauge(
            "kata_agent_total_rss",
            "Resident bytes of the agent.",
            Sample::alone(stat.resident_bytes),
        );
        text.gauge("kata_agent_proc_stat", "Processor time of the agent in ticks.", stat.items());
        text.family("kata_agent_process_cpu_seconds_total", "counter", cpu, Sample::alone(stat.seconds()));
        text.gauge("kata_agent_process_start_time_seconds", "Start of the agent since the epoch.", started);
        text.gauge(
            "kata_agent_process_virtual_memory_bytes",
            "Virtual memory of the agent.",
            Sample::alone(stat.virtual_bytes),
        );
        text.gauge(
            "kata_agent_process_resident_memory_bytes",
            "Resident memory of the agent.",
            Sample::alone(stat.resident_bytes),
        );
    }
    if let Ok(descriptors) = fs::read_dir("/proc/self/fd") {
        // The directory itself is open, too.
        let open = descriptors.count().saturating_sub(1);
        text.gauge(
            "kata_agent_process_open_fds",
            "Open file descriptors of the agent.",
            Sample::alone(number(open as u64)),
        );
    }
    if let Some(limit) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current {
        text.gauge(
            "kata_agent_process_max_fds",
            "Limit of open file descriptors.",
            Sample::alone(number(limit)),
        );
    }
    let status = procfs::status(&read("/proc/self/status"));
    text.gauge("kata_agent_proc_status", "Status of the agent; memory in KiB.", status);
    text.gauge("kata_agent_io_stat", "Input and output of the agent.", procfs::io(&read("/proc/self/io")));
}

fn guest(text: &mut Text) {
    let load = read("/proc/loadavg");
    text.gauge("kata_guest_load", "Load of the guest.", procfs::load(&load));
    text.gauge("kata_guest_tasks", "Tasks of the guest.", procfs::tasks(&load));
    text.gauge(
        "kata_guest_cpu_time",
        "Processor time of the guest in ticks.",
        procfs::cpu(&read("/proc/stat")),
    );
    text.gauge("kata_guest_vm_stat", "Virtual memory of the guest.", procfs::vmstat(&read("/proc/vmstat")));
    text.gauge(
        "kata_guest_netdev_stat",
        "Network devices of the guest.",
        procfs::netdev(&read("/proc/net/dev")),
    );
    text.gauge("kata_guest_diskstat", "Disks of the guest.", procfs::diskstats(&read("/proc/diskstats")));
    text.gauge(
        "kata_guest_meminfo",
        "Memory of the guest in bytes.",
        procfs::meminfo(&read("/proc/meminfo")),
    );
    let (bytes, inodes) = filesystem::figures(&read("/proc/self/mounts"));
    text.gauge("kata_guest_filesystem_bytes", "Space of file systems.", bytes);
    text.gauge("kata_guest_filesystem_inodes", "Inodes of file systems.", inodes);
}

/// A file of the kernel, whatever is in it.
fn read(path: &str) -> String {
    fs::read(path).map(|content| String::from_utf8_lossy(&content).into_owned()).unwrap_or_default()
}

/// Whole microseconds, so that no digit is noise.
fn seconds(time: Duration) -> f64 {
    Duration::from_micros(u64::try_from(time.as_micros()).unwrap_or(u64::MAX)).as_secs_f64()
}

#[allow(clippy::cast_precision_loss, reason = "the format has no other numbers")]
fn number(count: u64) -> f64 {
    count as f64
}

struct Text(String);

impl Text {
    fn gauge(&mut self, name: &str, help: &str, samples: Vec<Sample>) {
        self.family(name, "gauge", help, samples);
    }

    /// Without samples there is nothing to tell.
    fn family(&mut self, name: &str, kind: &str, help: &str, samples: Vec<Sample>) {
        if samples.is_empty() {
            return;
        }
        // Writing to a string cannot fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for Sample { labels, value } in samples {
            self.0.push_str(name);
            for (n, (label, text)) in labels.iter().enumerate() {
                self.0.push(if n == 0 { '{' } else { ',' });
                self.0.push_str(label);
                self.0.push_str("=\"");
                escape(&mut self.0, text);
                self.0.push('"');
            }
            let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
        }
    }
}

fn escape(text: &mut String, label: &str) {
    for character in label.chars() {
        match character {
            '\n' => text.push_str("\\n"),
            '"' | '\\' => text.extend(['\\', character]),
            other => text.push(other),
        }
    }
}

#[cfg(any(test, fuzzing))]
/// Files of anybody: a line of the text is a name and its labels, and a figure.
pub(crate) fn fuzz(text: &str) {
    let mut told = Text(String::new());
    let mut tell = |samples| told.gauge("x", "X.", samples);
    let stat = procfs::Stat::parse(text);
    tell(stat.map(|stat| stat.items()).unwrap_or_default());
    let families = [procfs::status, procfs::io, procfs::load, procfs::tasks, procfs::cpu, procfs::vmstat];
    families.into_iter().for_each(|family| tell(family(text)));
    [procfs::netdev, procfs::diskstats, procfs::meminfo].into_iter().for_each(|family| tell(family(text)));
    tell(procfs::boot_time(text).map(Sample::alone).unwrap_or_default());
    filesystem::fuzz(text);
    for line in told.0.lines().filter(|line| !line.starts_with('#')) {
        let figure = line.rsplit(' ').next().and_then(|figure| figure.parse::<f64>().ok());
        assert!(line.starts_with('x') && figure.is_some_and(f64::is_finite), "{line:?}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use super::*;

    #[test]
    fn the_milestones_are_told_with_their_stage() {
        let times =
            Times { started: Duration::from_nanos(1_230_000_999), listening: Arc::new(OnceLock::new()) };
        let metrics = Metrics::new(times.clone());
        assert!(metrics.text().contains("bulkhead_agent_boot_seconds{stage=\"started\"} 1.23\n"));
        assert!(!metrics.text().contains("stage=\"listening\""));
        times.listening.get_or_init(|| Duration::from_millis(1500));
        let text = metrics.clone().text();
        assert!(text.contains("bulkhead_agent_boot_seconds{stage=\"listening\"} 1.5\n"), "{text}");
        assert!(text.contains("kata_agent_scrape_count 3\n"), "{text}");
    }

    #[test]
    fn labels_are_escaped_and_an_empty_family_is_left_out() {
        let mut text = Text(String::new());
        text.gauge("none", "Nothing.", Vec::new());
        let labels = vec![("mount", "/a \"b\"\\\n".into()), ("item", "x".into())];
        text.gauge("some", "Something.", vec![Sample { labels, value: 0.5 }]);
        assert_eq!(
            text.0,
            "# HELP some Something.\n# TYPE some gauge\nsome{mount=\"/a \\\"b\\\"\\\\\\n\",item=\"x\"} 0.5\n"
        );
    }
}
