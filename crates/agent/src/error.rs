//! What can go wrong in a request, and the one table that turns it into a status on the wire.

use std::io;

use bulkhead_protocol::status::Kind;

/// A failed request. The text is the whole status message, so it says what failed, on what.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The request itself is wrong.
    #[error("{0}")]
    Invalid(String),
    /// The request asks for something this agent does not offer.
    #[error("the agent does not support {0}")]
    Unsupported(String),
    /// No container of that id.
    #[error("container {0:?} not found")]
    UnknownContainer(String),
    /// The container has no process of that id.
    #[error("process {exec:?} not found in container {container:?}")]
    UnknownProcess {
        /// The container.
        container: String,
        /// The exec id.
        exec: String,
    },
    /// The id is taken by a container, or the sandbox is there already.
    #[error("{0} already exists")]
    Exists(String),
    /// The request does not fit the state of what it names.
    #[error("{0}")]
    State(String),
    /// A bounded wait ran out; what it waited for goes on.
    #[error("{0}")]
    Timeout(String),
    /// The policy does not allow it.
    #[error("{0}")]
    Denied(String),
    /// The executor failed. Its text stays as it is: users know the words of a missing command by heart.
    #[error(transparent)]
    Executor(#[from] bulkhead_executor::Error),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was attempted, on what.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
}

/// What every request of the agent comes to.
pub(crate) type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The kind a caller can act on.
    pub(crate) fn kind(&self) -> Kind {
        use bulkhead_executor::Error as Executor;
        match self {
            Error::Invalid(_) | Error::UnknownContainer(_) => Kind::InvalidArgument,
            Error::UnknownProcess { .. } => Kind::NotFound,
            Error::Unsupported(_) => Kind::Unimplemented,
            Error::Exists(_) => Kind::AlreadyExists,
            Error::State(_) => Kind::FailedPrecondition,
            Error::Timeout(_) => Kind::DeadlineExceeded,
            Error::Denied(_) => Kind::PermissionDenied,
            Error::Io { .. } => Kind::Internal,
            Error::Executor(error) => match error {
                Executor::Invalid(_) | Executor::CommandNotFound(_) => Kind::InvalidArgument,
                Executor::Unsupported(_) => Kind::Unimplemented,
                Executor::WrongState { .. } => Kind::FailedPrecondition,
                Executor::CommandNotExecutable(_) => Kind::PermissionDenied,
                _ => Kind::Internal,
            },
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        error.kind().status(cut(error.to_string()))
    }
}

/// The longest text of an error, in bytes. A request's own words are in it, and those may have megabytes.
const LONGEST: usize = 4 << 10;

fn cut(mut text: String) -> String {
    if text.len() > LONGEST {
        text.truncate(text.floor_char_boundary(LONGEST));
        text.push('…');
    }
    text
}

/// Says what a system call was for when it fails.
pub(crate) trait During<T> {
    /// Names the attempt.
    fn during(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> During<T> for std::result::Result<T, E> {
    fn during(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source: source.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_command_keeps_its_text_and_gets_its_code() {
        let text = "exec: \"foo\": executable file not found in $PATH";
        let error = Error::from(bulkhead_executor::Error::CommandNotFound(text.into()));
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(error) else {
            panic!("a status is expected")
        };
        assert_eq!(status.message(), text);
        assert_eq!(status.code(), ttrpc::Code::INVALID_ARGUMENT);

        let error = Error::from(bulkhead_executor::Error::CommandNotExecutable("x".into()));
        assert_eq!(error.kind(), Kind::PermissionDenied);
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(cut("short".into()), "short");
        let text = cut("x".to_owned() + &"ü".repeat(LONGEST));
        assert!(text.ends_with("ü…") && text.len() <= LONGEST + 3, "{}", text.len());
    }

    #[test]
    fn unknown_ids_answer_as_the_protocol_says() {
        assert_eq!(Error::UnknownContainer("x".into()).kind(), Kind::InvalidArgument);
        let unknown = Error::UnknownProcess { container: "x".into(), exec: "y".into() };
        assert_eq!(unknown.kind(), Kind::NotFound);
    }
}
