//! What can go wrong with a VM: what failed, on what, and what to do next.

use std::{io, path::PathBuf, time::Duration};

/// A failed hypervisor operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A program or file the VM needs is missing.
    #[error("{what} not found at {path}: {remedy}")]
    Missing {
        /// What it is: "the guest kernel".
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// What to do next.
        remedy: &'static str,
    },
    /// The configuration asks for something that cannot be.
    #[error("invalid VM configuration: {0}")]
    Invalid(String),
    /// This backend cannot do it.
    #[error("{operation} is not supported by {backend}")]
    Unsupported {
        /// What was asked for.
        operation: &'static str,
        /// Who cannot.
        backend: &'static str,
    },
    /// The VMM ended before or while it was needed.
    #[error("the VMM ended with code {code}; its last words:\n{last_words}")]
    VmmExited {
        /// Exit code, or 128 + signal.
        code: i32,
        /// Console and output.
        last_words: String,
    },
    /// The VMM refused a command.
    #[error("QMP {command}: {reason}")]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's text.
        reason: String,
    },
    /// Nobody listens on the port (yet).
    #[error("the guest does not listen on vsock port {port}")]
    NotListening {
        /// The port.
        port: u32,
    },
    /// A bounded wait ran out.
    #[error("{what} took longer than {bound:?}; the guest's last words:\n{last_words}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// How long.
        bound: Duration,
        /// Console and output.
        last_words: String,
    },
    /// Anything of the operating system.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why.
        source: io::Error,
    },
}

impl Error {
    /// Names what was attempted, for `map_err`.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
        let what = what.into();
        move |source| Error::Io { what, source: source.into() }
    }

    /// The same error with the guest's last words, where it has room for them and lacks them.
    #[must_use]
    pub fn with_last_words(mut self, words: impl FnOnce() -> String) -> Error {
        if let Error::Timeout { last_words, .. } | Error::VmmExited { last_words, .. } = &mut self
            && last_words.is_empty()
        {
            *last_words = words();
        }
        self
    }
}
