//! GetMetrics of a real agent: valid Prometheus text with every name of the reference and true values.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "other tests use the rest")]
mod support;

use std::collections::BTreeMap;

use bulkhead_protocol::agent::GetMetricsRequest;
use support::{Agent, cannot_run, context};

/// Name and labels of each sample, and its value.
type Samples = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// Reads the text format strictly: each family has its help, its type and then its samples, and comes once.
fn parse(text: &str) -> Samples {
    let mut samples = Samples::new();
    let mut families = Vec::new();
    let mut lines = text.lines().peekable();
    while let Some(help) = lines.next() {
        let (family, _) = help.strip_prefix("# HELP ").expect(help).split_once(' ').unwrap();
        let kind = lines.next().unwrap().strip_prefix(&format!("# TYPE {family} ")).unwrap();
        assert!(["counter", "gauge"].contains(&kind) && !families.contains(&family), "{family} {kind}");
        families.push(family);
        while let Some(line) = lines.next_if(|line| !line.starts_with('#')) {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = sample.split_once('{').unwrap_or((sample, "}"));
            assert_eq!(name, family);
            let labels = self::labels(labels.strip_suffix('}').unwrap());
            assert!(samples.insert((name.into(), labels), value.parse().unwrap()).is_none(), "twice: {line}");
        }
    }
    samples
}

fn labels(text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (name, quoted) = rest.split_once("=\"").unwrap();
        let mut value = String::new();
        let mut letters = quoted.chars();
        loop {
            match letters.next().unwrap() {
                '"' => break,
                '\\' => value.push(match letters.next().unwrap() {
                    'n' => '\n',
                    letter @ ('"' | '\\') => letter,
                    other => panic!("unknown escape {other}"),
                }),
                letter => value.push(letter),
            }
        }
        assert!(labels.insert(name.to_owned(), value).is_none());
        rest = letters.as_str().trim_start_matches(',');
    }
    labels
}

fn value(samples: &Samples, name: &str, labels: &[(&str, &str)]) -> f64 {
    let labels = labels.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    *samples.get(&(name.to_owned(), labels)).unwrap_or_else(|| panic!("no {name}"))
}

#[tokio::test]
async fn every_figure_of_the_reference_is_there_and_true() {
    if let Some(reason) = cannot_run() {
        return eprintln!("skipped: {reason}");
    }
    let agent = Agent::start().await;
    let read = async || {
        let metrics = agent.client.get_metrics(context(), &GetMetricsRequest::new()).await.unwrap().metrics;
        parse(&metrics)
    };
    let samples = read().await;
    for name in [
        "kata_agent_scrape_count",
        "kata_agent_threads",
        "kata_agent_total_time",
        "kata_agent_total_vm",
        "kata_agent_total_rss",
        "kata_agent_proc_status",
        "kata_agent_io_stat",
        "kata_agent_proc_stat",
        "kata_guest_load",
        "kata_guest_tasks",
        "kata_guest_cpu_time",
        "kata_guest_vm_stat",
        "kata_guest_netdev_stat",
        "kata_guest_meminfo",
        "bulkhead_agent_boot_seconds",
    ] {
        assert!(samples.keys().any(|(sample, _)| sample == name), "{name} is missing");
    }
    let no_disks = std::fs::read_to_string("/proc/diskstats").unwrap().trim().is_empty();
    assert_eq!(samples.keys().any(|(sample, _)| sample == "kata_guest_diskstat"), !no_disks);
    for stage in ["started", "listening"] {
        assert!(value(&samples, "bulkhead_agent_boot_seconds", &[("stage", stage)]) > 0.0);
    }
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total: f64 =
        memory.strip_prefix("MemTotal:").unwrap().split_whitespace().next().unwrap().parse().unwrap();
    assert_eq!(value(&samples, "kata_guest_meminfo", &[("item", "mem_total")]), total * 1024.0);
    let resident = value(&samples, "kata_agent_total_rss", &[]);
    assert!(resident > 65_536.0 && resident < value(&samples, "kata_agent_total_vm", &[]));
    assert!(value(&samples, "kata_agent_threads", &[]) >= 1.0);
    let user = |cpu| value(&samples, "kata_guest_cpu_time", &[("cpu", cpu), ("item", "user")]);
    assert!(user("total") >= user("0"));
    for item in ["total", "used", "available"] {
        let count = |name: &str| {
            samples.keys().filter(|(sample, labels)| sample == name && labels["item"] == item).count()
        };
        assert_eq!(count("kata_guest_filesystem_bytes"), count("kata_guest_filesystem_inodes"));
    }
    let again = read().await;
    assert_eq!(value(&samples, "kata_agent_scrape_count", &[]), 1.0);
    assert_eq!(value(&again, "kata_agent_scrape_count", &[]), 2.0);
    assert!(agent.destroy().await.success());
}
