//! The kernel's command line, of which the agent takes the words that it knows.

use std::{ffi::OsString, io};

use super::{Config, Report, environment, file, value::Value};

const PREFIX: &str = "agent.";
const FILE: &str = "agent.config_file";

impl Config {
    /// The configuration of an init. A configuration file that the line names stands for everything else: the other words
    /// and the environment count only when it cannot be used.
    pub(super) fn from_kernel(
        line: &[u8],
        read: impl Fn(&str) -> io::Result<Vec<u8>>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> (Config, Report) {
        let line = String::from_utf8_lossy(line);
        let words = words(&line);
        let mut report = Report::default();
        if let Some((_, path)) = words.iter().find(|(name, _)| name == FILE) {
            match file::load(path.as_deref().unwrap_or(""), &read) {
                Ok(settings) => {
                    let mut config = Config::default();
                    config.take_file(settings, &mut report);
                    return (config, report);
                }
                Err(problem) => {
                    report.wrong(format!("{FILE}: {problem}; the other settings are used instead"))
                }
            }
        }
        let mut config = Config::default();
        for (name, value) in words.iter().filter(|(name, _)| name != FILE) {
            // The others are somebody else's.
            if name.starts_with(PREFIX)
                || super::SETTINGS.iter().any(|setting| setting.word == name && !name.is_empty())
            {
                let value = value.clone().map_or(Value::Bare, Value::Word);
                config.apply(name, &value, |setting| setting.word, &mut report);
            }
        }
        environment::read(&mut config, variable, &mut report);
        (config, report)
    }
}

/// The words of a line with their values. As for the kernel itself, double quotes keep blanks in a word and fall away.
fn words(line: &str) -> Vec<(String, Option<String>)> {
    let mut quoted = false;
    line.split(|letter: char| {
        quoted ^= letter == '"';
        letter == '\0' || (letter.is_ascii_whitespace() && !quoted)
    })
    .map(|word| word.replace('"', ""))
    .filter(|word| !word.is_empty())
    .map(|word| match word.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
        None => (word, None),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tracing::Level;

    use super::*;

    fn read(line: impl AsRef<[u8]>) -> (Config, Report) {
        Config::from_kernel(line.as_ref(), |_| Err(io::ErrorKind::NotFound.into()), |_| None)
    }

    #[test]
    fn known_words_are_taken_and_foreign_ones_are_left() {
        let (config, report) = read(
            "console=ttyS0 quiet agent.log=debug agent.log_vport=1025 agent.trace=true loglevel=3 -- x\n",
        );
        assert_eq!(report, Report::default());
        assert_eq!(
            config,
            Config { log_level: Level::DEBUG, log_port: 1025, tracing: true, ..Config::default() }
        );
        assert_eq!(read("").0, Config::default());
        let (config, _) = read(
            "agent.hotplug_timeout=20 agent.container_pipe_size=1048576 agent.passfd_listener_port=1027",
        );
        assert_eq!(config.hotplug_timeout, Duration::from_secs(20));
        assert_eq!((config.pipe_size, config.stream_port), (1 << 20, 1027));
    }

    #[test]
    fn a_switch_is_on_bare_and_with_its_value_alike() {
        for word in ["agent.debug_console", "agent.debug_console=true", "agent.debug_console=1"] {
            assert!(read(word).0.debug_console, "{word}");
        }
        for word in ["agent.debug_console=false", "agent.debug_console=0", "agent.devmode"] {
            assert!(!read(word).0.debug_console, "{word}");
        }
        assert!(read("agent.trace").0.tracing);
    }

    #[test]
    fn the_cgroup_words_are_accepted() {
        let line = "cgroup_no_v1=all systemd.unified_cgroup_hierarchy=1 cgroup_no_v1=memory,named";
        assert_eq!(read(line), (Config::default(), Report::default()));
    }

    #[test]
    fn a_wrong_value_leaves_the_default_and_the_rest() {
        let (config, report) = read("agent.log=loud agent.hotplug_timeout=0 agent.log_vport=1025");
        assert_eq!(config, Config { log_port: 1025, ..Config::default() });
        let [level, timeout] = report.wrong.as_slice() else { panic!("{report:?}") };
        assert!(level.starts_with("agent.log: loud is not error, warn"), "{level}");
        assert!(
            timeout.contains("agent.hotplug_timeout: 0") && timeout.ends_with("the default is 3"),
            "{timeout}"
        );
    }

    #[test]
    fn an_unknown_word_is_told_with_the_nearest_known() {
        let (config, report) =
            read("agent.logvport=1025 agent.secure_image_storage_integrity=true agent.x=1");
        assert_eq!(config, Config::default());
        assert!(report.wrong.is_empty());
        let told = &report.unheeded;
        assert!(
            told[0].contains("agent.logvport") && told[0].contains("is agent.log_vport meant?"),
            "{told:?}"
        );
        assert!(told[1].contains("is agent.secure_storage_integrity meant?"), "{told:?}");
        assert!(told[2].ends_with("is ignored"), "{told:?}");
    }

    #[test]
    fn the_order_of_the_reclaimers_words_does_not_matter() {
        let mut words = [
            "agent.mem_agent_compact_order=3",
            "agent.mem_agent_enable=1",
            "agent.mem_agent_memcg_swap=true",
        ];
        let told = |words: [&str; 3]| {
            let mut told = read(words.join(" ")).1.unheeded;
            told.sort();
            told
        };
        let one = told(words);
        words.reverse();
        assert_eq!((one.len(), &one), (3, &told(words)));
    }

    #[test]
    fn quotes_keep_blanks() {
        let (config, _) =
            read("foo=\"bar agent.log=trace\" agent.server_addr=\"unix:///run/a b\" agent.log=debug");
        assert_eq!((config.server.as_str(), config.log_level), ("unix:///run/a b", Level::DEBUG));
    }

    #[test]
    fn hostile_lines_are_survived() {
        let mut huge = b"agent.log=debug agent.server_addr=".to_vec();
        huge.extend(vec![b'x'; 4 << 20]);
        for (line, level) in [
            (b"agent.log=debug\0agent.log_vport=7\0".to_vec(), Level::DEBUG),
            (b"\xff\xfe=\x80 agent.\xff=1 agent.log=debug".to_vec(), Level::DEBUG),
            (b"agent.log=\xff".to_vec(), Level::INFO),
            (b"= == agent.= agent. agent \" \"\" =agent.log".to_vec(), Level::INFO),
            (huge, Level::DEBUG),
        ] {
            assert_eq!(read(line).0.log_level, level);
        }
    }

    #[test]
    fn a_file_stands_for_everything_else() {
        let variable = |name: &str| (name == "KATA_AGENT_LOG_LEVEL").then(|| "trace".into());
        let file = |path: &str| match path {
            "/etc/agent.toml" => Ok(b"log_vport = 7".to_vec()),
            _ => Err(io::ErrorKind::NotFound.into()),
        };
        let line = b"agent.log=debug agent.config_file=/etc/agent.toml agent.trace";
        let (config, report) = Config::from_kernel(line, file, variable);
        assert_eq!((config, report), (Config { log_port: 7, ..Config::default() }, Report::default()));
        // One that is not there is told, and the rest counts.
        let (config, report) = Config::from_kernel(b"agent.config_file=/no agent.trace", file, variable);
        assert_eq!(config, Config { tracing: true, log_level: Level::TRACE, ..Config::default() });
        assert!(report.wrong[0].contains("/no"), "{report:?}");
    }
}
