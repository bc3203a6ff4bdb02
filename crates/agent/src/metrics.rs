//! The figures of GetMetrics in Prometheus' text format, read when they are asked for.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use crate::boot::Times;

/// How the agent is doing.
#[derive(Debug)]
pub(crate) struct Metrics {
    times: Times,
    scrapes: AtomicU64,
}

impl Metrics {
    /// Figures of an agent that reached its milestones then.
    pub(crate) fn new(times: Times) -> Metrics {
        Metrics { times, scrapes: AtomicU64::new(0) }
    }

    /// All of them as text.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, f64)]| {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
            for (labels, value) in samples {
                let _ = writeln!(text, "{name}{labels} {value}");
            }
        };
        let stage = |name: &str| format!("{{stage=\"{name}\"}}");
        let mut boot = vec![(stage("started"), seconds(self.times.started))];
        boot.extend(self.times.listening.get().map(|listening| (stage("listening"), seconds(*listening))));
        metric("bulkhead_agent_boot_seconds", "gauge", "Time from the start of the machine.", &boot);
        let scrapes = self.scrapes.fetch_add(1, Ordering::Relaxed) + 1;
        #[allow(clippy::cast_precision_loss, reason = "a count of scrapes stays far below 2^53")]
        metric(
            "kata_agent_scrape_count",
            "counter",
            "Reads of these figures.",
            &[(String::new(), scrapes as f64)],
        );
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        for (name, help, value) in process_figures(&stat) {
            metric(name, "gauge", help, &[(String::new(), value)]);
        }
        text
    }
}

/// Whole microseconds, so that no digit is noise.
fn seconds(time: Duration) -> f64 {
    Duration::from_micros(u64::try_from(time.as_micros()).unwrap_or(u64::MAX)).as_secs_f64()
}

/// What /proc/self/stat tells: proc(5). The fields are counted from behind the command, which may hold anything.
fn process_figures(stat: &str) -> Vec<(&'static str, &'static str, f64)> {
    let Some((_, rest)) = stat.rsplit_once(") ") else { return Vec::new() };
    let fields: Vec<f64> = rest.split_whitespace().map(|field| field.parse().unwrap_or(0.0)).collect();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or(0.0);
    let ticks = 100.0; // USER_HZ, part of the kernel's interface
    #[allow(clippy::cast_precision_loss, reason = "a page is some thousand bytes")]
    let page = rustix::param::page_size() as f64;
    vec![
        ("kata_agent_threads", "Threads.", field(20)),
        ("kata_agent_total_time", "Seconds of processor time.", (field(14) + field(15)) / ticks),
        ("kata_agent_total_vm", "Bytes of address space.", field(23)),
        ("kata_agent_total_rss", "Bytes resident.", field(24) * page),
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, OnceLock};

    use super::*;

    #[test]
    fn the_milestones_are_told_with_their_stage() {
        let times =
            Times { started: Duration::from_nanos(1_230_000_999), listening: Arc::new(OnceLock::new()) };
        let metrics = Metrics::new(times.clone());
        assert!(metrics.text().contains("bulkhead_agent_boot_seconds{stage=\"started\"} 1.23\n"));
        assert!(!metrics.text().contains("stage=\"listening\""));
        times.listening.get_or_init(|| Duration::from_millis(1500));
        let text = metrics.text();
        assert!(text.contains("bulkhead_agent_boot_seconds{stage=\"listening\"} 1.5\n"), "{text}");
        assert!(text.contains("kata_agent_scrape_count 3\n"), "{text}");
    }

    #[test]
    fn process_figures_survive_a_strange_name() {
        let figures = process_figures("7 (a) b) S 1 1 1 0 -1 0 0 0 0 0 150 50 0 0 20 0 3 0 9 4096 2 0\n");
        let value = |name: &str| figures.iter().find(|(n, ..)| *n == name).unwrap().2;
        assert_eq!(value("kata_agent_threads"), 3.0);
        assert_eq!(value("kata_agent_total_time"), 2.0);
        assert_eq!(value("kata_agent_total_vm"), 4096.0);
        assert_eq!(value("kata_agent_total_rss"), 2.0 * rustix::param::page_size() as f64);
    }
}
