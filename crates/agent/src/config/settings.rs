//! The table of settings: names, forms and defaults are those of the protocol's other agents.

use super::{
    Config, Report,
    value::{Value, address, bytes, choice, flag, level, port, seconds, text, url, whole},
};

/// One setting.
pub(super) struct Setting {
    /// Its name on the kernel's command line; empty when it has none.
    pub(super) word: &'static str,
    /// Its name in a file; empty when it has none.
    pub(super) key: &'static str,
    /// What a value looks like, for a message.
    form: &'static str,
    /// Its value unless it is set.
    pub(super) default: &'static str,
    effect: Effect,
}

enum Effect {
    /// It has its place; `None` for a value of the wrong form.
    Sets(fn(&mut Config, &Value) -> Option<()>),
    /// It is known, and means nothing here.
    Accepted(fn(&Value) -> Option<()>),
    /// It belongs to a part that this agent does not have; whether the value asks for that part.
    Lacks(&'static str, fn(&Value) -> Option<bool>),
}

use Effect::{Accepted, Lacks, Sets};

const FLAG: &str = "true or false";
const PORT: &str = "a port number, 0 for none";
const SECONDS: &str = "a number of seconds above 0";
const PERCENT: &str = "a number from 0 to 255";
const COUNT: &str = "a number of at least 0";
const TEXT: &str = "text";
const ADDRESS: &str = "vsock://<cid or -1>:<port> or unix://<path>";

const ATTESTATION: &str = "attestation and secrets";
const PULL: &str = "pulling images in the guest";
const CDI: &str = "device descriptions of the guest (CDI)";
const RECLAIM: &str = "the memory reclaimer (mem-agent)";

const REST: [&str; 3] = ["all", "attestation", "resource"];
const PROCESSES: [&str; 4] = ["none", "attestation-agent", "confidential-data-hub", "api-server-rest"];

const fn row(
    word: &'static str,
    key: &'static str,
    form: &'static str,
    default: &'static str,
    effect: Effect,
) -> Setting {
    Setting { word, key, form, default, effect }
}

fn put<T>(place: &mut T, value: Option<T>) -> Option<()> {
    *place = value?;
    Some(())
}

fn other_number(value: &Value, most: i64, default: i64) -> Option<bool> {
    Some(whole(value, 0, most)? != default)
}

fn other_seconds(value: &Value, default: u64) -> Option<bool> {
    Some(seconds(value)? != std::time::Duration::from_secs(default))
}

/// Every setting. `agent.config_file` is not among them: it replaces all the others.
pub(super) static SETTINGS: &[Setting] = &[
    row(
        "agent.server_addr",
        "server_addr",
        ADDRESS,
        "vsock://-1:1024",
        Sets(|c, v| put(&mut c.server, address(v))),
    ),
    row(
        "agent.log",
        "log_level",
        "error, warn, info, debug or trace",
        "info",
        Sets(|c, v| put(&mut c.log_level, level(v))),
    ),
    row("agent.log_vport", "log_vport", PORT, "0", Sets(|c, v| put(&mut c.log_port, port(v)))),
    row(
        "agent.debug_console",
        "debug_console",
        FLAG,
        "false",
        Sets(|c, v| put(&mut c.debug_console, flag(v))),
    ),
    row(
        "agent.debug_console_vport",
        "debug_console_vport",
        PORT,
        "0",
        Sets(|c, v| put(&mut c.debug_console_port, port(v))),
    ),
    row(
        "agent.passfd_listener_port",
        "passfd_listener_port",
        PORT,
        "0",
        Sets(|c, v| put(&mut c.stream_port, port(v))),
    ),
    row("agent.trace", "tracing", FLAG, "false", Sets(|c, v| put(&mut c.tracing, flag(v)))),
    row(
        "agent.trace_addr",
        "trace_addr",
        ADDRESS,
        "vsock://2:10240",
        Sets(|c, v| put(&mut c.trace_address, address(v))),
    ),
    row(
        "agent.hotplug_timeout",
        "hotplug_timeout",
        SECONDS,
        "3",
        Sets(|c, v| put(&mut c.hotplug_timeout, seconds(v))),
    ),
    row(
        "agent.container_pipe_size",
        "container_pipe_size",
        "a number of bytes, 0 for the kernel's choice",
        "0",
        Sets(|c, v| put(&mut c.pipe_size, bytes(v))),
    ),
    row("", "policy_file", "a path", "", Sets(|c, v| put(&mut c.policy_file, text(v).map(Into::into)))),
    // It changed nothing in the agent that has it, either.
    row("agent.devmode", "dev_mode", FLAG, "false", Accepted(|v| flag(v).map(drop))),
    // The agent uses cgroup v2 whatever these say. The first one is the kernel's own, with values that are its affair.
    row("cgroup_no_v1", "", TEXT, "", Accepted(|_| Some(()))),
    row(
        "systemd.unified_cgroup_hierarchy",
        "unified_cgroup_hierarchy",
        FLAG,
        "false",
        Accepted(|v| flag(v).map(drop)),
    ),
    row(
        "agent.cdh_api_timeout",
        "cdh_api_timeout",
        SECONDS,
        "50",
        Lacks(ATTESTATION, |v| other_seconds(v, 50)),
    ),
    row(
        "agent.launch_process_timeout",
        "launch_process_timeout",
        SECONDS,
        "6",
        Lacks(ATTESTATION, |v| other_seconds(v, 6)),
    ),
    row(
        "agent.guest_components_rest_api",
        "guest_components_rest_api",
        "all, attestation or resource",
        "resource",
        Lacks(ATTESTATION, |v| choice(v, &REST).map(|word| word != "resource")),
    ),
    row(
        "agent.guest_components_procs",
        "guest_components_procs",
        "none, attestation-agent, confidential-data-hub or api-server-rest",
        "api-server-rest",
        Lacks(ATTESTATION, |v| choice(v, &PROCESSES).map(|word| !matches!(word, "api-server-rest" | "none"))),
    ),
    row(
        "agent.secure_storage_integrity",
        "secure_storage_integrity",
        FLAG,
        "true",
        Lacks(ATTESTATION, |v| flag(v).map(|on| !on)),
    ),
    row(
        "agent.image_pull_timeout",
        "image_pull_timeout",
        SECONDS,
        "1200",
        Lacks(PULL, |v| other_seconds(v, 1200)),
    ),
    row("agent.https_proxy", "https_proxy", "a URL", "", Lacks(PULL, |v| url(v).map(|url| !url.is_empty()))),
    row("agent.no_proxy", "no_proxy", TEXT, "", Lacks(PULL, |v| text(v).map(|text| !text.is_empty()))),
    row("agent.cdi_timeout", "cdi_timeout", SECONDS, "100", Lacks(CDI, |v| other_seconds(v, 100))),
    row("agent.visible_cdi_devices", "visible_cdi_devices", FLAG, "false", Lacks(CDI, flag)),
    row("agent.mem_agent_enable", "mem_agent_enable", FLAG, "false", Lacks(RECLAIM, flag)),
    row("agent.mem_agent_memcg_disable", "mem_agent_memcg_disable", FLAG, "false", Lacks(RECLAIM, flag)),
    row("agent.mem_agent_memcg_swap", "mem_agent_memcg_swap", FLAG, "false", Lacks(RECLAIM, flag)),
    row(
        "agent.mem_agent_memcg_swappiness_max",
        "mem_agent_memcg_swappiness_max",
        PERCENT,
        "50",
        Lacks(RECLAIM, |v| other_number(v, 255, 50)),
    ),
    row(
        "agent.mem_agent_memcg_period_secs",
        "mem_agent_memcg_period_secs",
        COUNT,
        "600",
        Lacks(RECLAIM, |v| other_number(v, i64::MAX, 600)),
    ),
    row(
        "agent.mem_agent_memcg_period_psi_percent_limit",
        "mem_agent_memcg_period_psi_percent_limit",
        PERCENT,
        "1",
        Lacks(RECLAIM, |v| other_number(v, 255, 1)),
    ),
    row(
        "agent.mem_agent_memcg_eviction_psi_percent_limit",
        "mem_agent_memcg_eviction_psi_percent_limit",
        PERCENT,
        "1",
        Lacks(RECLAIM, |v| other_number(v, 255, 1)),
    ),
    row(
        "agent.mem_agent_memcg_eviction_run_aging_count_min",
        "mem_agent_memcg_eviction_run_aging_count_min",
        COUNT,
        "3",
        Lacks(RECLAIM, |v| other_number(v, i64::MAX, 3)),
    ),
    row("agent.mem_agent_compact_disable", "mem_agent_compact_disable", FLAG, "false", Lacks(RECLAIM, flag)),
    row(
        "agent.mem_agent_compact_period_secs",
        "mem_agent_compact_period_secs",
        COUNT,
        "600",
        Lacks(RECLAIM, |v| other_number(v, i64::MAX, 600)),
    ),
    row(
        "agent.mem_agent_compact_period_psi_percent_limit",
        "mem_agent_compact_period_psi_percent_limit",
        PERCENT,
        "1",
        Lacks(RECLAIM, |v| other_number(v, 255, 1)),
    ),
    row(
        "agent.mem_agent_compact_psi_percent_limit",
        "mem_agent_compact_psi_percent_limit",
        PERCENT,
        "5",
        Lacks(RECLAIM, |v| other_number(v, 255, 5)),
    ),
    row(
        "agent.mem_agent_compact_sec_max",
        "mem_agent_compact_sec_max",
        "a number of seconds",
        "300",
        Lacks(RECLAIM, |v| whole(v, i64::MIN, i64::MAX).map(|n| n != 300)),
    ),
    row(
        "agent.mem_agent_compact_order",
        "mem_agent_compact_order",
        PERCENT,
        "9",
        Lacks(RECLAIM, |v| other_number(v, 255, 9)),
    ),
    row(
        "agent.mem_agent_compact_threshold",
        "mem_agent_compact_threshold",
        COUNT,
        "1024",
        Lacks(RECLAIM, |v| other_number(v, i64::MAX, 1024)),
    ),
    row(
        "agent.mem_agent_compact_force_times",
        "mem_agent_compact_force_times",
        COUNT,
        "9223372036854775807",
        Lacks(RECLAIM, |v| other_number(v, i64::MAX, i64::MAX)),
    ),
];

impl Setting {
    /// Takes a value, which the source gave under `name`.
    pub(super) fn apply(&self, config: &mut Config, name: &str, value: &Value, report: &mut Report) {
        let asks = match self.effect {
            Sets(set) => set(config, value).map(|()| None),
            Accepted(check) => check(value).map(|()| None),
            Lacks(part, asks) => asks(value).map(|asks| asks.then_some(part)),
        };
        match asks {
            Some(None) => {}
            Some(Some(part)) => {
                report.unheeded(format!("{name}: {value} has no effect: this agent does not offer {part}"))
            }
            None => report.wrong(format!(
                "{name}: {value} is not {}; without it the default is {}",
                self.form,
                if self.default.is_empty() { "empty" } else { self.default }
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(setting: &Setting, text: &str) -> (Config, Report) {
        let (mut config, mut report) = (Config::default(), Report::default());
        setting.apply(&mut config, setting.word, &Value::Word(text.into()), &mut report);
        (config, report)
    }

    #[test]
    fn every_default_is_what_the_table_says() {
        for setting in SETTINGS {
            let (config, report) = word(setting, setting.default);
            assert_eq!(
                (config, report),
                (Config::default(), Report::default()),
                "{} {}",
                setting.word,
                setting.key
            );
        }
    }

    /// The names, forms and defaults of the reference, one row each, written out a second time.
    #[test]
    fn the_table_has_every_name_of_the_reference() {
        let reference = "debug_console devmode:dev_mode trace:tracing log:log_level server_addr passfd_listener_port \
            hotplug_timeout cdh_api_timeout image_pull_timeout cdi_timeout launch_process_timeout \
            visible_cdi_devices debug_console_vport log_vport container_pipe_size https_proxy no_proxy \
            guest_components_rest_api guest_components_procs secure_storage_integrity mem_agent_enable \
            mem_agent_memcg_disable mem_agent_memcg_swap mem_agent_memcg_swappiness_max mem_agent_memcg_period_secs \
            mem_agent_memcg_period_psi_percent_limit mem_agent_memcg_eviction_psi_percent_limit \
            mem_agent_memcg_eviction_run_aging_count_min mem_agent_compact_disable mem_agent_compact_period_secs \
            mem_agent_compact_period_psi_percent_limit mem_agent_compact_psi_percent_limit \
            mem_agent_compact_sec_max mem_agent_compact_order mem_agent_compact_threshold \
            mem_agent_compact_force_times trace_addr";
        let mut names: Vec<(String, &str)> = reference
            .split_whitespace()
            .map(|name| name.split_once(':').unwrap_or((name, name)))
            .map(|(word, key)| (format!("agent.{word}"), key))
            .collect();
        names.extend([
            (String::new(), "policy_file"),
            ("cgroup_no_v1".into(), ""),
            ("systemd.unified_cgroup_hierarchy".into(), "unified_cgroup_hierarchy"),
        ]);
        names.sort();
        let mut table: Vec<_> =
            SETTINGS.iter().map(|setting| (setting.word.to_owned(), setting.key)).collect();
        table.sort();
        assert_eq!(table, names);
    }

    #[test]
    fn a_value_of_the_wrong_form_is_told_with_its_name_and_form_and_changes_nothing() {
        for setting in SETTINGS.iter().filter(|setting| !matches!(setting.form, TEXT | "a path")) {
            for bad in ["loud", "-9223372036854775809", "\0", "ü"] {
                let (config, report) = word(setting, bad);
                assert_eq!(config, Config::default(), "{}", setting.word);
                let [problem] = report.wrong.as_slice() else { panic!("{} took {bad:?}", setting.word) };
                assert!(problem.contains(setting.word) && problem.contains(setting.form), "{problem}");
            }
        }
    }

    #[test]
    fn what_is_not_offered_is_told_only_when_it_is_asked_for() {
        let asks = [
            ("agent.mem_agent_enable", "1", "mem-agent"),
            ("agent.mem_agent_compact_order", "3", "mem-agent"),
            ("agent.guest_components_procs", "attestation-agent", "attestation"),
            ("agent.visible_cdi_devices", "true", "CDI"),
            ("agent.image_pull_timeout", "5", "images"),
        ];
        for (name, value, part) in asks {
            let setting = SETTINGS.iter().find(|setting| setting.word == name).unwrap();
            let (config, report) = word(setting, value);
            assert_eq!(config, Config::default());
            assert!(report.wrong.is_empty() && report.unheeded[0].contains(part), "{report:?}");
        }
        let none = SETTINGS.iter().find(|setting| setting.key == "guest_components_procs").unwrap();
        assert_eq!(word(none, "none").1, Report::default(), "that is what there is");
    }

    #[test]
    fn hostile_values_of_every_setting_are_survived() {
        let huge = "9".repeat(4 << 20);
        for setting in SETTINGS {
            for value in ["", "=", "\0\0", "true=", "18446744073709551616", huge.as_str()] {
                let (_, report) = word(setting, value);
                assert!(report.wrong.iter().chain(&report.unheeded).all(|line| line.len() < 400));
            }
        }
        assert_eq!(crate::config::value::shown(&huge).len(), 67);
    }
}
