//! The environment, which overrides what was said before it.

use std::ffi::OsString;

use super::{Config, Report, SETTINGS, value::Value};

/// Names of variables, and of their settings in a file.
const VARIABLES: [(&str, &str); 4] = [
    ("KATA_AGENT_SERVER_ADDR", "server_addr"),
    ("KATA_AGENT_LOG_LEVEL", "log_level"),
    ("KATA_AGENT_TRACING", "tracing"),
    ("KATA_AGENT_POLICY_FILE", "policy_file"),
];

/// Takes the variables that are set.
pub(super) fn read(config: &mut Config, variable: impl Fn(&str) -> Option<OsString>, report: &mut Report) {
    for (name, key) in VARIABLES {
        let Some(value) = variable(name) else { continue };
        let value = Value::Word(value.to_string_lossy().into_owned());
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.key == key) {
            setting.apply(config, name, &value, report);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStringExt;

    use tracing::Level;

    use super::*;

    #[test]
    fn each_variable_sets_its_setting() {
        let mut config = Config::default();
        let mut report = Report::default();
        let value = |name: &str| {
            Some(match name {
                "KATA_AGENT_SERVER_ADDR" => "unix:///a".into(),
                "KATA_AGENT_LOG_LEVEL" => "debug".into(),
                "KATA_AGENT_TRACING" => "true".into(),
                "KATA_AGENT_POLICY_FILE" => "/etc/policy".into(),
                _ => return None,
            })
        };
        read(&mut config, value, &mut report);
        let expected = Config {
            server: "unix:///a".into(),
            log_level: Level::DEBUG,
            tracing: true,
            policy_file: "/etc/policy".into(),
            ..Config::default()
        };
        assert_eq!((config, report), (expected, Report::default()));
    }

    #[test]
    fn a_wrong_variable_is_told_by_name() {
        let mut config = Config::default();
        let mut report = Report::default();
        read(&mut config, |_| Some(OsString::from_vec(vec![0xff])), &mut report);
        assert_eq!(config.log_level, Level::INFO);
        assert!(report.wrong.iter().any(|line| line.starts_with("KATA_AGENT_LOG_LEVEL: ")), "{report:?}");
    }
}
