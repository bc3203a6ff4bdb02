//! Logging into the bundle's `log` fifo, which containerd copies into its own log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use tracing::Level;

/// Opens the fifo for reading and writing: that needs no reader, and with a reader of our own no write ever ends in SIGPIPE
/// while containerd restarts. Without blocking: when nobody reads and the fifo is full, lines are dropped.
pub(crate) fn open(bundle: &Path) -> io::Result<File> {
    let path = bundle.join("log");
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&path)?;
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other(format!("{} is not a fifo", path.display())));
    }
    Ok(file)
}

/// Directs every log line of this process there.
pub(crate) fn init(fifo: File, debug: bool) {
    let level = if debug { Level::DEBUG } else { Level::INFO };
    let subscriber = tracing_subscriber::fmt()
        .with_writer(Arc::new(Lossy(fifo)))
        .with_max_level(level)
        .with_ansi(false)
        .with_target(false);
    // Fails only when there is a subscriber already, which is as good.
    let _ = tracing::subscriber::set_global_default(subscriber.finish());
}

/// A writer for which a full fifo is no error.
#[derive(Debug)]
struct Lossy(File);

impl Write for &Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match (&self.0).write(line) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(line.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::sys::stat::Mode;

    use super::*;

    #[test]
    fn a_missing_reader_neither_blocks_nor_fails() {
        let directory = tempfile::tempdir().unwrap();
        nix::unistd::mkfifo(&directory.path().join("log"), Mode::S_IRWXU).unwrap();
        let fifo = Lossy(open(directory.path()).unwrap());
        for _ in 0..100 {
            (&fifo).write_all(&[b'x'; 4096]).unwrap();
        }
        let mut reader = File::open(directory.path().join("log")).unwrap();
        let mut first = [0; 4096];
        reader.read_exact(&mut first).unwrap();
        (&fifo).write_all(b"after").unwrap();
    }

    #[test]
    fn only_a_fifo_will_do() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(open(directory.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
        std::fs::write(directory.path().join("log"), "").unwrap();
        assert!(open(directory.path()).is_err());
    }
}
