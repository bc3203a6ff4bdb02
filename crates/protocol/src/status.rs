//! The error kinds of the product and their ttrpc codes, in one table.

/// What went wrong, as far as a caller can act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The request itself is wrong; sending it again cannot help.
    InvalidArgument,
    /// The named container, exec or thing is not known (any more).
    NotFound,
    /// The id is taken; what holds it is untouched.
    AlreadyExists,
    /// Right request, wrong state: not started yet, already stopped, paused.
    FailedPrecondition,
    /// A policy or the kernel refused.
    PermissionDenied,
    /// A bounded wait ran out.
    DeadlineExceeded,
    /// Not offered by this build or this guest.
    Unimplemented,
    /// The other end is gone.
    Unavailable,
    /// Anything else: a system call failed, an invariant broke.
    Internal,
}

const TABLE: [(Kind, ttrpc::Code); 9] = [
    (Kind::InvalidArgument, ttrpc::Code::INVALID_ARGUMENT),
    (Kind::NotFound, ttrpc::Code::NOT_FOUND),
    (Kind::AlreadyExists, ttrpc::Code::ALREADY_EXISTS),
    (Kind::FailedPrecondition, ttrpc::Code::FAILED_PRECONDITION),
    (Kind::PermissionDenied, ttrpc::Code::PERMISSION_DENIED),
    (Kind::DeadlineExceeded, ttrpc::Code::DEADLINE_EXCEEDED),
    (Kind::Unimplemented, ttrpc::Code::UNIMPLEMENTED),
    (Kind::Unavailable, ttrpc::Code::UNAVAILABLE),
    (Kind::Internal, ttrpc::Code::INTERNAL),
];

impl Kind {
    /// The code that stands for this kind on the wire.
    pub fn code(self) -> ttrpc::Code {
        TABLE.iter().find(|(kind, _)| *kind == self).map_or(ttrpc::Code::INTERNAL, |(_, code)| *code)
    }

    /// The kind that a peer's code stands for; a code without a kind of its own is [`Kind::Internal`].
    pub fn of_code(code: ttrpc::Code) -> Kind {
        TABLE.iter().find(|(_, known)| *known == code).map_or(Kind::Internal, |(kind, _)| *kind)
    }

    /// The kind behind a failed call: the peer's code, or [`Kind::Unavailable`] when no answer came.
    pub fn of_error(error: &ttrpc::Error) -> Kind {
        match error {
            ttrpc::Error::RpcStatus(status) => Kind::of_code(status.code()),
            _ => Kind::Unavailable,
        }
    }

    /// A status of this kind, to be returned from a service method.
    pub fn status(self, message: impl Into<String>) -> ttrpc::Error {
        ttrpc::Error::RpcStatus(ttrpc::get_status(self.code(), message.into()))
    }
}

/// How much of a peer's text is passed on, in characters.
const MESSAGE_LIMIT: usize = 4096;

/// The text of a failed call without the library's wrapping. The peer may be hostile: control characters, which a terminal
/// would obey, become spaces (a newline stays), and an endless text is cut.
pub fn message(error: &ttrpc::Error) -> String {
    let harmless = |c: char| if c.is_control() && c != '\n' { ' ' } else { c };
    match error {
        ttrpc::Error::RpcStatus(status) => {
            status.message().chars().take(MESSAGE_LIMIT).map(harmless).collect()
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_text_is_made_harmless() {
        let text = format!("exec: \u{1b}]0;title\u{7}\n{}", "x".repeat(1 << 20));
        let message = message(&Kind::Internal.status(text));
        assert!(message.starts_with("exec:  ]0;title \nxxx") && message.chars().count() == MESSAGE_LIMIT);
    }

    #[test]
    fn kinds_survive_the_wire() {
        for (kind, _) in TABLE {
            assert_eq!(Kind::of_error(&kind.status("x")), kind);
        }
    }
}
