//! What goes wrong in a stage.

use std::io;

/// An errno, and on what.
#[derive(Debug)]
pub(super) struct Fault {
    /// The errno.
    pub(super) errno: i32,
    /// A path, a name, a number, or why the errno alone does not tell.
    pub(super) detail: Option<String>,
}

/// What a stage returns.
pub(super) type Outcome = Result<(), Fault>;

impl Fault {
    /// A failure that no system call reported.
    pub(super) fn new(errno: i32, detail: impl Into<String>) -> Fault {
        Fault { errno, detail: Some(detail.into()) }
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Fault {
        match error.raw_os_error() {
            Some(errno) => Fault { errno, detail: None },
            None => Fault::new(libc::EIO, error.to_string()),
        }
    }
}

impl From<rustix::io::Errno> for Fault {
    fn from(errno: rustix::io::Errno) -> Fault {
        Fault { errno: errno.raw_os_error(), detail: None }
    }
}

/// Names what a call failed on.
pub(super) trait On<T> {
    /// With `detail`, which is made only after a failure.
    fn on<D: Into<String>>(self, detail: impl FnOnce() -> D) -> Result<T, Fault>;
}

impl<T, E: Into<Fault>> On<T> for Result<T, E> {
    fn on<D: Into<String>>(self, detail: impl FnOnce() -> D) -> Result<T, Fault> {
        self.map_err(|error| {
            let fault = error.into();
            let detail = match fault.detail {
                Some(inner) => format!("{}: {inner}", detail().into()),
                None => detail().into(),
            };
            Fault::new(fault.errno, detail)
        })
    }
}
