//! Locks and tasks: short critical sections, work that must not be cut short, work that blocks.

use std::{
    future::Future,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::error::{Error, Result};

/// Locks for a moment. A panic elsewhere must not turn into a second one here: every critical section of the agent leaves
/// its data consistent at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs work that changes the agent's state to its end, even when the client hangs up or its deadline passes: ttrpc drops
/// the handler then, and a half-made container would be left to nobody.
pub(crate) async fn to_the_end<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    tokio::spawn(work).await.unwrap_or_else(|error| Err(lost(error)))
}

/// Runs work that blocks, off the runtime's thread.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(lost(error)))
}

fn lost(error: tokio::task::JoinError) -> Error {
    Error::Io { what: "run a task of the agent".into(), source: io::Error::other(error) }
}
