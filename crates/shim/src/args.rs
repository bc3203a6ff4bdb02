//! The command line that containerd gives a shim, in the style of Go's `flag` package: one or two dashes, `-key value` or
//! `-key=value`, and the first word that is no flag is the action.

use std::path::PathBuf;

/// What this invocation is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Make a server for a container, or name the one that serves its pod.
    Start,
    /// Clean up after a server that died.
    Delete,
    /// No action: be the server, on the listener given as standard input.
    Serve,
    /// Print the version.
    Version,
    /// Print what this runtime is, as protobuf.
    Info,
}

/// The parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Args {
    /// What to do.
    pub(crate) action: Action,
    /// containerd's namespace.
    pub(crate) namespace: String,
    /// Address of containerd's gRPC socket.
    pub(crate) address: String,
    /// containerd's own binary, an older way to publish events. Handed on to the server, not used.
    pub(crate) publish_binary: String,
    /// The container (or sandbox) the shim was started for.
    pub(crate) id: String,
    /// The bundle; the working directory when absent.
    pub(crate) bundle: Option<PathBuf>,
    /// Log at debug level.
    pub(crate) debug: bool,
}

/// A command line that cannot be understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ArgsError {
    /// Not a flag of a shim.
    #[error(
        "unknown flag -{0}; a shim takes -namespace, -address, -publish-binary, -id, -bundle, -debug, -v, -info"
    )]
    UnknownFlag(String),
    /// A flag at the end, without its value.
    #[error("flag -{0} needs a value")]
    MissingValue(String),
    /// A boolean flag with something else.
    #[error("flag -{0} is true or false, not {1:?}")]
    NotBoolean(String, String),
    /// Not an action of a shim.
    #[error("unknown action {0:?}; a shim knows start and delete")]
    UnknownAction(String),
    /// The action cannot do without this flag.
    #[error("-{0} is required")]
    Required(&'static str),
    /// An identifier that could name another path.
    #[error(
        "-{flag} {value:?} is not a valid identifier: letters, digits, '_', '.' and '-', beginning with a letter or digit"
    )]
    BadIdentifier {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
    },
}

impl Args {
    /// Parses the words after the program's name.
    pub(crate) fn parse(words: impl IntoIterator<Item = String>) -> Result<Args, ArgsError> {
        let mut args = Args {
            action: Action::Serve,
            namespace: String::new(),
            address: String::new(),
            publish_binary: String::new(),
            id: String::new(),
            bundle: None,
            debug: false,
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let Some(flag) =
                word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|flag| !flag.is_empty())
            else {
                args.action = action(&word)?;
                break;
            };
            let (name, inline) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            match name {
                "debug" => args.debug = boolean(name, inline)?,
                "v" | "version" if boolean(name, inline.clone())? => args.action = Action::Version,
                "info" if boolean(name, inline.clone())? => args.action = Action::Info,
                "v" | "version" | "info" => {}
                _ => {
                    let value = inline
                        .or_else(|| words.next())
                        .ok_or_else(|| ArgsError::MissingValue(name.to_owned()))?;
                    args.set(name, value)?;
                }
            }
            if matches!(args.action, Action::Version | Action::Info) {
                return Ok(args);
            }
        }
        args.validated()
    }

    fn set(&mut self, name: &str, value: String) -> Result<(), ArgsError> {
        match name {
            "namespace" => self.namespace = value,
            "address" => self.address = value,
            "publish-binary" => self.publish_binary = value,
            "id" => self.id = value,
            "bundle" => self.bundle = (!value.is_empty()).then(|| PathBuf::from(value)),
            // containerd's own shims take these; what they ask for is decided by the bootstrap protocol here.
            "socket" | "debug-socket" => {}
            _ => return Err(ArgsError::UnknownFlag(name.to_owned())),
        }
        Ok(())
    }

    fn validated(self) -> Result<Args, ArgsError> {
        for (flag, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if value.is_empty() {
                return Err(ArgsError::Required(flag));
            }
            if !is_identifier(value) {
                return Err(ArgsError::BadIdentifier { flag, value: value.clone() });
            }
        }
        Ok(self)
    }
}

fn action(word: &str) -> Result<Action, ArgsError> {
    match word {
        "start" => Ok(Action::Start),
        "delete" => Ok(Action::Delete),
        "" => Ok(Action::Serve),
        other => Err(ArgsError::UnknownAction(other.to_owned())),
    }
}

fn boolean(name: &str, value: Option<String>) -> Result<bool, ArgsError> {
    match value.as_deref() {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(other) => Err(ArgsError::NotBoolean(name.to_owned(), other.to_owned())),
    }
}

/// Whether a string may be part of a path: containerd's own rule for ids and namespaces, without its length limit.
pub(crate) fn is_identifier(value: &str) -> bool {
    value.starts_with(|c: char| c.is_ascii_alphanumeric())
        && value.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, ArgsError> {
        Args::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn every_form_of_a_flag_means_the_same() {
        let want =
            parse("-namespace k8s.io -address /c.sock -publish-binary /bin/c -id a -debug start").unwrap();
        assert_eq!(want.action, Action::Start);
        assert_eq!((want.namespace.as_str(), want.id.as_str(), want.debug), ("k8s.io", "a", true));
        for line in [
            "--namespace k8s.io --address /c.sock --publish-binary /bin/c --id a --debug start",
            "-namespace=k8s.io -address=/c.sock -publish-binary=/bin/c -id=a -debug=true start",
            "--id=a --debug=1 -namespace k8s.io --address=/c.sock -publish-binary /bin/c start",
        ] {
            assert_eq!(parse(line).unwrap(), want, "{line}");
        }
    }

    #[test]
    fn without_an_action_it_serves() {
        let args = parse("-namespace n -id a -address x").unwrap();
        assert_eq!((args.action, args.debug), (Action::Serve, false));
    }

    #[test]
    fn delete_names_its_bundle() {
        let args = parse("-namespace n -id a -bundle /b -debug=false delete").unwrap();
        assert_eq!((args.action, args.bundle), (Action::Delete, Some(PathBuf::from("/b"))));
    }

    #[test]
    fn version_and_info_need_nothing_else() {
        for (line, action) in
            [("-v", Action::Version), ("--version", Action::Version), ("-info", Action::Info)]
        {
            assert_eq!(parse(line).unwrap().action, action, "{line}");
        }
    }

    #[test]
    fn a_wrong_line_says_what_is_wrong() {
        for (line, error) in [
            ("-namespace n start", ArgsError::Required("id")),
            ("-id a start", ArgsError::Required("namespace")),
            ("-frobnicate 1 start", ArgsError::UnknownFlag("frobnicate".into())),
            ("-id a -namespace", ArgsError::MissingValue("namespace".into())),
            ("-id a -namespace n stop", ArgsError::UnknownAction("stop".into())),
            ("-debug=perhaps", ArgsError::NotBoolean("debug".into(), "perhaps".into())),
            ("-id ../x -namespace n start", ArgsError::BadIdentifier { flag: "id", value: "../x".into() }),
            ("-id a/b -namespace n start", ArgsError::BadIdentifier { flag: "id", value: "a/b".into() }),
        ] {
            assert_eq!(parse(line).unwrap_err(), error, "{line}");
        }
    }
}
