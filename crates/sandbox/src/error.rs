//! What can go wrong with a pod, and which kind of failure it is for the callers' own codes.

use std::{io, path::PathBuf, time::Duration};

use bulkhead_protocol::{oci_json::Unrepresentable, status::Kind};

/// A failed sandbox operation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The configuration file or a value in it is wrong.
    #[error("configuration {path}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// The bundle, the spec or a request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// No such container or exec.
    #[error("{what} {id} not found")]
    NotFound {
        /// "container", "exec", "sandbox".
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The id is taken.
    #[error("{what} {id} already exists")]
    AlreadyExists {
        /// "container", "exec", "sandbox".
        what: &'static str,
        /// Its id.
        id: String,
    },
    /// The operation does not fit the state.
    #[error("{0}")]
    WrongState(String),
    /// Not offered.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The agent refused or failed.
    #[error("{operation}: {message}")]
    Agent {
        /// The RPC.
        operation: &'static str,
        /// The agent's kind of failure.
        kind: Kind,
        /// The agent's text.
        message: String,
    },
    /// The agent did not answer in time; the text ends with the guest's last words.
    #[error("the guest agent did not answer within {bound:?}; the guest's last words:\n{last_words}")]
    AgentSilent {
        /// The bound that ran out.
        bound: Duration,
        /// Console and VMM output.
        last_words: String,
    },
    /// The VM could not be booted, or failed.
    #[error(transparent)]
    Vm(#[from] bulkhead_hypervisor::Error),
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
    /// The kind of this failure, from which each edge takes its own code.
    pub fn kind(&self) -> Kind {
        match self {
            Error::Config { .. } | Error::Invalid(_) => Kind::InvalidArgument,
            Error::NotFound { .. } => Kind::NotFound,
            Error::AlreadyExists { .. } => Kind::AlreadyExists,
            Error::WrongState(_) => Kind::FailedPrecondition,
            Error::Unsupported(_) => Kind::Unimplemented,
            Error::Agent { kind, .. } => *kind,
            Error::AgentSilent { .. } => Kind::DeadlineExceeded,
            Error::Vm(error) => vm_kind(error),
            Error::Io { .. } => Kind::Internal,
        }
    }
}

impl From<Unrepresentable> for Error {
    fn from(field: Unrepresentable) -> Error {
        Error::Unsupported(format!("{field}; remove it from the configuration"))
    }
}

/// For `map_err`: an operating system's error on `what`.
pub(crate) fn os<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source: source.into() }
}

fn vm_kind(error: &bulkhead_hypervisor::Error) -> Kind {
    use bulkhead_hypervisor::Error;
    match error {
        Error::Invalid(_) => Kind::InvalidArgument,
        Error::Missing { .. } => Kind::FailedPrecondition,
        Error::Unsupported { .. } => Kind::Unimplemented,
        Error::Timeout { .. } => Kind::DeadlineExceeded,
        _ => Kind::Unavailable,
    }
}
