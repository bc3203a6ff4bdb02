//! The user's terminal: its size, and raw mode, which is undone however this process ends.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Mutex, Once, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use rustix::termios::{self, OptionalActions, Termios};

/// What the terminal was like before raw mode; for the panic hook, which has no access to anything else.
static SAVED: Mutex<Option<(OwnedFd, Termios)>> = Mutex::new(None);

/// Whether the standard input is a terminal.
pub(crate) fn on_stdin() -> bool {
    termios::isatty(io::stdin())
}

/// Whether the standard error is a terminal in raw mode, where a new line does not begin at the left.
pub(crate) fn needs_return() -> bool {
    SAVED.lock().unwrap_or_else(PoisonError::into_inner).is_some() && termios::isatty(io::stderr())
}

/// Says why a terminal cannot be interactive here, before anything is started.
pub(crate) fn check(interactive: bool, terminal: bool) -> Result<()> {
    ensure!(
        !(interactive && terminal) || on_stdin(),
        "-i and -t together need a terminal, and the standard input is none; leave -t out"
    );
    Ok(())
}

/// Rows and columns of the user's terminal.
pub(crate) fn size() -> Option<(u16, u16)> {
    let of = |fd: std::os::fd::BorrowedFd<'_>| termios::tcgetwinsize(fd).ok().filter(|size| size.ws_row > 0);
    let size = of(io::stdin().as_fd()).or_else(|| of(io::stdout().as_fd()))?;
    Some((size.ws_row, size.ws_col))
}

/// Raw mode on the standard input; dropping it restores what was before.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Enters raw mode: what is typed goes to the container, Ctrl-C included.
    pub(crate) fn enter() -> Result<Raw> {
        // The release build aborts on a panic: no destructor runs then, but the hook does.
        static HOOK: Once = Once::new();
        HOOK.call_once(|| {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                next(panic);
            }));
        });
        let fd = io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
        let before = termios::tcgetattr(&fd).context("the terminal's attributes")?;
        let mut raw = before.clone();
        raw.make_raw();
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some((fd, before));
        let guard = Raw(());
        termios::tcsetattr(io::stdin(), OptionalActions::Flush, &raw)
            .context("set the terminal to raw mode")?;
        Ok(guard)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    // A panic while the lock is held is not possible: nothing in its scope panics.
    if let Some((fd, before)) = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Nothing can be done about a terminal that is gone.
        let _ = termios::tcsetattr(fd, OptionalActions::Now, &before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn restoring_without_raw_mode_does_nothing() {
        restore();
        assert!(check(true, false).is_ok() && check(false, true).is_ok());
    }
}
