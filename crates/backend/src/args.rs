//! The command line: few options, no defaults that matter, parsed by hand to keep the program small.

use std::{
    ffi::{OsStr, OsString},
    os::fd::RawFd,
    path::PathBuf,
};

/// How to call the program.
pub(crate) const USAGE: &str = "\
usage: bulkhead-backend vsock --fd N --uds-fd N --uds PATH --cid N
       bulkhead-backend fs --fd N --shared-dir DIR [--cache never|auto|always]

Serves one vhost-user device to one VMM, which connects to the listening unix socket that descriptor --fd is.

  --uds-fd N        listening unix socket, bound at --uds, on which host programs reach the guest's ports
  --uds PATH        its path; connections of the guest to port P go to PATH_P
  --cid N           the guest's context id, 3 or more
  --shared-dir DIR  the directory the guest sees
  --cache POLICY    how long the guest may trust what it has read; auto by default";

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// Serve a vsock device.
    Vsock {
        /// Listener for the VMM.
        fd: RawFd,
        /// Listener for host programs.
        uds_fd: RawFd,
        /// Where the latter is bound.
        uds: PathBuf,
        /// The guest's context id.
        cid: u64,
    },
    /// Serve a directory.
    Fs {
        /// Listener for the VMM.
        fd: RawFd,
        /// The directory.
        shared_dir: PathBuf,
        /// Cache policy.
        cache: Cache,
    },
    /// Print [`USAGE`].
    Help,
}

/// How long the guest may trust what it has read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cache {
    /// Not at all.
    Never,
    /// Names and attributes for a second, data until the file is opened again.
    Auto,
    /// For ever: nobody else changes the directory.
    Always,
}

/// What is wrong with a command line.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Error {
    #[error("no device given")]
    NoDevice,
    #[error("unknown device {0:?}")]
    UnknownDevice(OsString),
    #[error("unknown option {0:?}")]
    UnknownOption(OsString),
    #[error("option {0} is given twice")]
    Twice(&'static str),
    #[error("option {0} needs a value")]
    NoValue(&'static str),
    #[error("option {0} is missing")]
    Missing(&'static str),
    #[error("--fd and --uds-fd are both descriptor {0}")]
    SameDescriptor(RawFd),
    #[error("option {option} does not take {value:?}: {expected}")]
    BadValue { option: &'static str, value: OsString, expected: &'static str },
}

/// Reads the arguments after the program's name.
pub(crate) fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, Error> {
    let mut args = args.into_iter();
    let device = args.next().ok_or(Error::NoDevice)?;
    match device.to_str() {
        Some("vsock") => {
            let mut options = Options::read(args, &["--fd", "--uds-fd", "--uds", "--cid"])?;
            let (fd, uds_fd) = (options.fd("--fd")?, options.fd("--uds-fd")?);
            if fd == uds_fd {
                return Err(Error::SameDescriptor(fd));
            }
            Ok(Command::Vsock {
                fd,
                uds_fd,
                uds: options.take("--uds")?.into(),
                cid: options.number("--cid", "a number from 3 to 4294967294", |cid| {
                    (3..u64::from(u32::MAX)).contains(cid)
                })?,
            })
        }
        Some("fs") => {
            let mut options = Options::read(args, &["--fd", "--shared-dir", "--cache"])?;
            Ok(Command::Fs {
                fd: options.fd("--fd")?,
                shared_dir: options.take("--shared-dir")?.into(),
                cache: options.cache()?,
            })
        }
        Some("--help" | "-h" | "help") => Ok(Command::Help),
        _ => Err(Error::UnknownDevice(device)),
    }
}

struct Options(Vec<(&'static str, OsString)>);

impl Options {
    fn read(mut args: impl Iterator<Item = OsString>, known: &[&'static str]) -> Result<Self, Error> {
        let mut options: Vec<(&'static str, OsString)> = Vec::new();
        while let Some(arg) = args.next() {
            let Some(name) = known.iter().find(|name| OsStr::new(name) == arg) else {
                return Err(Error::UnknownOption(arg));
            };
            if options.iter().any(|(given, _)| given == name) {
                return Err(Error::Twice(name));
            }
            options.push((name, args.next().ok_or(Error::NoValue(name))?));
        }
        Ok(Self(options))
    }

    fn take_if_given(&mut self, name: &str) -> Option<OsString> {
        let at = self.0.iter().position(|(given, _)| *given == name)?;
        Some(self.0.swap_remove(at).1)
    }

    fn take(&mut self, name: &'static str) -> Result<OsString, Error> {
        self.take_if_given(name).ok_or(Error::Missing(name))
    }

    fn number<N: std::str::FromStr>(
        &mut self,
        option: &'static str,
        expected: &'static str,
        allowed: impl Fn(&N) -> bool,
    ) -> Result<N, Error> {
        let value = self.take(option)?;
        let number = value.to_str().and_then(|text| text.parse().ok()).filter(allowed);
        number.ok_or(Error::BadValue { option, value, expected })
    }

    fn fd(&mut self, option: &'static str) -> Result<RawFd, Error> {
        self.number(option, "the number of an open descriptor, 3 or more", |fd| *fd >= 3)
    }

    fn cache(&mut self) -> Result<Cache, Error> {
        let Some(value) = self.take_if_given("--cache") else { return Ok(Cache::Auto) };
        match value.to_str() {
            Some("never") => Ok(Cache::Never),
            Some("auto") => Ok(Cache::Auto),
            Some("always") => Ok(Cache::Always),
            _ => Err(Error::BadValue { option: "--cache", value, expected: "never, auto or always" }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Command, Error> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn good_lines() {
        assert_eq!(
            parse_line("vsock --fd 3 --uds-fd 4 --uds /run/v.sock --cid 3"),
            Ok(Command::Vsock { fd: 3, uds_fd: 4, uds: "/run/v.sock".into(), cid: 3 })
        );
        assert_eq!(
            parse_line("fs --cache never --shared-dir /s --fd 3"),
            Ok(Command::Fs { fd: 3, shared_dir: "/s".into(), cache: Cache::Never })
        );
        assert_eq!(
            parse_line("fs --shared-dir /s --fd 3"),
            Ok(Command::Fs { fd: 3, shared_dir: "/s".into(), cache: Cache::Auto })
        );
        assert_eq!(parse_line("--help"), Ok(Command::Help));
    }

    #[test]
    fn bad_lines_say_what_is_wrong() {
        for (line, message) in [
            ("", "no device given"),
            ("gpu", "unknown device \"gpu\""),
            ("fs --fd 3", "option --shared-dir is missing"),
            ("fs --fd 3 --fd 4 --shared-dir /s", "option --fd is given twice"),
            ("fs --shared-dir /s --fd", "option --fd needs a value"),
            (
                "fs --fd 2 --shared-dir /s",
                "option --fd does not take \"2\": the number of an open descriptor, 3 or more",
            ),
            (
                "fs --fd 3 --shared-dir /s --cache no",
                "option --cache does not take \"no\": never, auto or always",
            ),
            ("fs --fd 3 --cid 3", "unknown option \"--cid\""),
            (
                "vsock --fd 3 --uds-fd 4 --uds /v --cid 2",
                "option --cid does not take \"2\": a number from 3 to 4294967294",
            ),
            ("vsock --fd 3 --uds-fd 4 --cid 3", "option --uds is missing"),
            ("vsock --fd 3 --uds-fd 3 --uds /v --cid 3", "--fd and --uds-fd are both descriptor 3"),
        ] {
            assert_eq!(parse_line(line).unwrap_err().to_string(), message, "{line:?}");
        }
    }
}
