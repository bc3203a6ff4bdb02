//! Locks and tasks: short critical sections, work that must not be cut short, work that blocks.

use std::{
    future::Future,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    task::JoinHandle,
};

use crate::{
    error::{Error, Result},
    threads,
};

/// Locks for a moment. A panic elsewhere must not turn into a second one here: every critical section of the agent leaves
/// its data consistent at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts a task. It is boxed here, as is the work of [`spawn_blocking`]: a runtime's code for a task is made once for each
/// type of future, and with some hundred types that was an eighth of the program.
pub(crate) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    fn start(work: Pin<Box<dyn Future<Output = ()> + Send>>) -> JoinHandle<()> {
        tokio::spawn(work)
    }
    start(Box::pin(work))
}

/// Starts work that blocks, off the runtime's thread.
pub(crate) fn spawn_blocking(work: impl FnOnce() + Send + 'static) {
    threads::start(Box::new(work));
}

/// Runs work that changes the agent's state to its end, even when the client hangs up or its deadline passes: ttrpc drops
/// the handler then, and a half-made container would be left to nobody.
pub(crate) async fn to_the_end<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let (sender, result) = oneshot::channel();
    // Whoever gave up has no use for the result.
    spawn(async move { drop(sender.send(work.await)) });
    result.await.unwrap_or_else(|_| Err(lost()))
}

/// Runs work that blocks, off the runtime's thread.
pub(crate) async fn blocking<T, F>(work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    let (sender, result) = oneshot::channel();
    spawn_blocking(move || drop(sender.send(work())));
    result.await.unwrap_or_else(|_| Err(lost()))
}

/// A turn in a lane that may hang is waited for this long, which is less than hosts wait for an answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Bounds how much work of one owner blocks at a time, so that what hangs with one leaves the threads to others.
#[derive(Clone)]
pub(crate) struct Lane(Arc<Semaphore>);

impl Lane {
    /// Of `width` threads.
    pub(crate) fn new(width: usize) -> Lane {
        Lane(Arc::new(Semaphore::new(width)))
    }

    /// As [`blocking`], when it is its turn. The place is taken until the work ends, even if nobody waits for it any more.
    pub(crate) async fn blocking<T, F>(&self, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        // It is never closed.
        let place = Arc::clone(&self.0).acquire_owned().await.ok();
        in_place(place, work).await
    }

    /// As [`Lane::blocking`], for work that can hang for ever, as with a volume whose server is gone: whoever has waited
    /// [`PATIENCE`] for its turn is told so.
    pub(crate) async fn bounded<T, F>(&self, what: &str, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce() -> Result<T> + Send + 'static,
    {
        let Ok(place) = tokio::time::timeout(PATIENCE, Arc::clone(&self.0).acquire_owned()).await else {
            let waited = PATIENCE.as_secs();
            return Err(Error::Timeout(format!(
                "cannot {what}: earlier requests of that kind hang, and none has ended within {waited} s"
            )));
        };
        in_place(place.ok(), work).await
    }
}

async fn in_place<T, F>(place: Option<OwnedSemaphorePermit>, work: F) -> Result<T>
where
    T: Send + 'static,
    F: FnOnce() -> Result<T> + Send + 'static,
{
    blocking(move || {
        let result = work();
        drop(place);
        result
    })
    .await
}

fn lost() -> Error {
    Error::Io { what: "run a task of the agent".into(), source: io::Error::other("it was lost") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lane_is_as_wide_as_it_is_and_others_are_free() {
        let (narrow, other) = (Lane::new(1), Lane::new(1));
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let lane = narrow.clone();
        // Given up by whoever asked; its place stays taken.
        let hung = tokio::spawn(async move { lane.blocking(move || Ok(hang.recv().is_ok())).await });
        while narrow.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        hung.abort();
        let lane = narrow.clone();
        let next = tokio::spawn(async move { lane.blocking(|| Ok(1)).await });
        assert_eq!(other.blocking(|| Ok(2)).await.unwrap(), 2);
        assert!(!next.is_finished());
        release.send(()).unwrap();
        assert_eq!(next.await.unwrap().unwrap(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_behind_work_that_hangs_is_told_so() {
        let lane = Lane::new(1);
        let (_hang, hung) = std::sync::mpsc::channel::<()>();
        let hanging = lane.clone();
        let _first =
            tokio::spawn(async move { hanging.bounded("look", move || Ok(hung.recv().is_ok())).await });
        while lane.0.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let told = lane.bounded("look at a volume", || Ok(())).await.unwrap_err();
        assert!(
            matches!(&told, Error::Timeout(text) if text.starts_with("cannot look at a volume: ")),
            "{told}"
        );
    }
}
