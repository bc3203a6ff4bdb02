//! Standard streams: fifos, files or descriptors on the host, to and from the guest; an exit is reported after the output
//! is drained.
//!
//! ```text
//! host end (fifo, file, descriptor) ──feed──► WriteStdin ... CloseStdin        32 KiB pieces, order kept,
//! host end ◄──drain── ReadStdout / ReadStderr until end of file                one piece ahead
//! ```

mod copy;
mod host;
mod sys;

use std::os::fd::OwnedFd;

pub(crate) use copy::{Copier, Stdin, StreamId};
pub(crate) use host::Ends;

/// Where one stream goes on the host.
#[derive(Debug, Default)]
pub enum StdioTarget {
    /// Nowhere: no stream is copied; the process reads end-of-file, and what it writes is discarded.
    #[default]
    Null,
    /// containerd's form: a fifo's path, or `file://` and an absolute path (output only).
    Uri(String),
    /// A descriptor of ours: a pipe, a terminal, a file.
    Fd(OwnedFd),
}

/// The standard streams of a process.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard input.
    pub stdin: StdioTarget,
    /// Standard output; with a terminal, all output.
    pub stdout: StdioTarget,
    /// Standard error; unused with a terminal.
    pub stderr: StdioTarget,
    /// The process gets a terminal in the guest.
    pub terminal: bool,
}
