//! Failures of a pod as ttrpc statuses. The kinds and their codes are `bulkhead_protocol::status`' one table; what
//! containerd does with a code is why the kind must survive: NOT_FOUND means "already gone" to its Delete and Kill.

use std::{io, path::Path};

use bulkhead_protocol::status::{self, Kind};
use bulkhead_sandbox::Error;

/// The status of a failed operation, with its text unchanged: clients look in it for "executable file not found".
pub(crate) fn status(error: Error) -> ttrpc::Error {
    error.kind().status(error.to_string())
}

/// The status of a signal to a process that has ended, in the words that clients know.
pub(crate) fn already_finished() -> ttrpc::Error {
    Kind::NotFound.status("process already finished")
}

/// A failed system call on a path.
pub(crate) fn io(what: &str, path: &Path, source: io::Error) -> Error {
    Error::Io { what: format!("{what} {}", path.display()), source }
}

/// The exit code for a process that could not be started, as shells have it: 127 for a command that does not exist, 126
/// for one that cannot be executed, and 255 for every other reason.
pub(crate) fn exit_code_of_failed_start(error: &Error) -> i32 {
    match error {
        Error::Agent { kind: Kind::InvalidArgument, message, .. }
            if message.contains("executable file not found")
                || message.contains("no such file or directory") =>
        {
            127
        }
        Error::Agent { kind: Kind::PermissionDenied, .. } => 126,
        _ => 255,
    }
}

/// The text of a failed call to a peer.
pub(crate) fn text(error: &ttrpc::Error) -> String {
    status::message(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn code(error: Error) -> ttrpc::Code {
        match status(error) {
            ttrpc::Error::RpcStatus(status) => status.code(),
            other => panic!("{other} has no code"),
        }
    }

    #[test]
    fn every_kind_keeps_its_code() {
        let agent = |kind| Error::Agent { operation: "StartContainer", kind, message: "x".into() };
        for (error, want) in [
            (Error::NotFound { what: "container", id: "a".into() }, ttrpc::Code::NOT_FOUND),
            (Error::AlreadyExists { what: "exec", id: "a".into() }, ttrpc::Code::ALREADY_EXISTS),
            (Error::Invalid("x".into()), ttrpc::Code::INVALID_ARGUMENT),
            (Error::WrongState("x".into()), ttrpc::Code::FAILED_PRECONDITION),
            (Error::Unsupported("x".into()), ttrpc::Code::UNIMPLEMENTED),
            (agent(Kind::NotFound), ttrpc::Code::NOT_FOUND),
            (agent(Kind::PermissionDenied), ttrpc::Code::PERMISSION_DENIED),
            (agent(Kind::Unavailable), ttrpc::Code::UNAVAILABLE),
            (io("open", Path::new("/x"), io::ErrorKind::StorageFull.into()), ttrpc::Code::INTERNAL),
        ] {
            assert_eq!(code(error), want);
        }
    }

    #[test]
    fn the_executors_words_reach_the_client() {
        let words = "exec: \"foo\": executable file not found in $PATH";
        let error =
            Error::Agent { operation: "StartContainer", kind: Kind::InvalidArgument, message: words.into() };
        assert_eq!(exit_code_of_failed_start(&error), 127);
        assert!(text(&status(error)).contains(words));
        let refused =
            Error::Agent { operation: "ExecProcess", kind: Kind::PermissionDenied, message: "x".into() };
        assert_eq!(exit_code_of_failed_start(&refused), 126);
        assert_eq!(exit_code_of_failed_start(&Error::Invalid("x".into())), 255);
    }
}
