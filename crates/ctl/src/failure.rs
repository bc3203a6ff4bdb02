//! From an error to what the user sees: one line, and an exit code.

use bulkhead_protocol::status::Kind;
use bulkhead_sandbox::Error;

use crate::lookup::NotThere;

/// We failed, not the command: as with docker.
pub(crate) const OURS: u8 = 125;
/// The command is there and cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// The command is not there.
const NOT_FOUND: u8 = 127;

/// The line for an error: what failed, on what, why, outermost first.
pub(crate) fn line(error: &anyhow::Error) -> String {
    format!("bulkhead: {}", format!("{error:#}").trim_end())
}

/// The exit code for a failed `run` or `exec`.
pub(crate) fn code(error: &anyhow::Error) -> u8 {
    let command = error.chain().find_map(|cause| match cause.downcast_ref::<Error>() {
        Some(Error::Agent { kind, message, .. }) => command_code(*kind, message),
        Some(_) => None,
        None => command_code(Kind::InvalidArgument, &cause.downcast_ref::<NotThere>()?.to_string()),
    });
    command.unwrap_or(OURS)
}

/// Decides from the executor's words, which are runc's: `exec: "x": ...`.
fn command_code(kind: Kind, message: &str) -> Option<u8> {
    let words = &message[message.find("exec: \"")?..];
    if words.contains("executable file not found") || words.contains("no such file or directory") {
        return Some(NOT_FOUND);
    }
    let refused = ["permission denied", "is a directory", "not a directory", "exec format error"];
    let refused = refused.iter().any(|refusal| words.contains(refusal));
    (refused || kind == Kind::PermissionDenied).then_some(NOT_EXECUTABLE)
}

/// The text of a call that the agent refused or did not answer.
pub(crate) fn agent(operation: &'static str, error: &ttrpc::Error) -> Error {
    let message = bulkhead_protocol::status::message(error);
    Error::Agent { operation, kind: Kind::of_error(error), message }
}

/// The exit code a shell gives to the death by a signal.
pub(crate) fn signalled(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn refused(kind: Kind, message: &str) -> u8 {
        let error = Error::Agent { operation: "CreateContainer", kind, message: message.to_owned() };
        code(&Err::<(), _>(error).context("start container x").unwrap_err())
    }

    #[test]
    fn codes_of_commands() {
        let wrong = Kind::InvalidArgument;
        assert_eq!(refused(wrong, r#"exec: "foo": executable file not found in $PATH"#), 127);
        assert_eq!(refused(wrong, r#"exec: "/foo": stat /foo: no such file or directory"#), 127);
        assert_eq!(refused(Kind::PermissionDenied, r#"exec: "/etc": permission denied"#), 126);
        assert_eq!(refused(Kind::Internal, r#"exec: "/etc": is a directory"#), 126);
        assert_eq!(refused(Kind::Internal, r#"exec: "/x": exec format error"#), 126);
        assert_eq!(refused(Kind::PermissionDenied, "the kernel said no"), 125);
        assert_eq!(refused(wrong, "mount /x: no such file or directory"), 125);
        assert_eq!(code(&anyhow::anyhow!(r#"exec: "x": executable file not found"#)), 125);
    }

    #[test]
    fn what_is_missed_here_has_the_code_that_the_guest_would_give() {
        let root = crate::inroot::Root::open(std::path::Path::new("/")).unwrap();
        for (command, expected) in [("/no/such", 127), ("no-such-command", 127), ("/etc/passwd/x", 126)] {
            let missed = crate::lookup::check(&root, command, "/usr/bin", "/");
            assert_eq!(code(&missed.context("run container x").unwrap_err()), expected, "{command}");
        }
    }

    #[test]
    fn one_line_outermost_first() {
        let error = anyhow::anyhow!("not there; make it").context("rootfs /x");
        assert_eq!(line(&error), "bulkhead: rootfs /x: not there; make it");
        assert_eq!(signalled(15), 143);
    }
}
