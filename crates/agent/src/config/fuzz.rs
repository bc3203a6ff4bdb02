//! Configurations as anybody might write them.

use super::{Config, Report, file};

/// A line, and behind the first line break the file that it may name.
pub(crate) fn kernel_line(data: &[u8]) {
    let (line, file) = match data.iter().position(|byte| *byte == b'\n') {
        Some(end) => data.split_at(end),
        None => (data, &b""[..]),
    };
    let (config, report) = Config::from_kernel(line, |_| Ok(file.to_vec()), |_| None);
    sound(&config, &report);
}

/// A file.
pub(crate) fn file(data: &[u8]) {
    let mut report = Report::default();
    let mut config = Config::default();
    if let Ok(settings) = file::load("agent.toml", |_| Ok(data.to_vec())) {
        config.take_file(settings, &mut report);
    }
    sound(&config, &report);
}

/// What is wrong is told in words that fit on a line of the log, and never taken over.
fn sound(config: &Config, report: &Report) {
    assert!(crate::server::Address::parse(&config.server).is_ok());
    assert!(!config.hotplug_timeout.is_zero());
    for problem in report.wrong.iter().chain(&report.unheeded) {
        assert!(!problem.contains('\n'), "{problem:?}");
    }
}
