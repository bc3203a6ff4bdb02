//! `--timing`: where the time of a run went, as one line that programs can read.

use std::time::{Duration, Instant};

use bulkhead_sandbox::{GuestTimings, Timings};

/// The moments of a run, as they pass.
#[derive(Debug)]
pub(crate) struct Timing {
    started: Instant,
    pub(crate) sandbox: Option<Timings>,
    pub(crate) guest: Option<GuestTimings>,
    pub(crate) created: Option<Duration>,
    pub(crate) first_output: Option<Instant>,
    pub(crate) exited: Option<Instant>,
    pub(crate) teardown: Option<Duration>,
}

impl Timing {
    /// A run that started then.
    pub(crate) fn new(started: Instant) -> Timing {
        Timing {
            started,
            sandbox: None,
            guest: None,
            created: None,
            first_output: None,
            exited: None,
            teardown: None,
        }
    }

    /// The line. Moments (`first_output_ms`, `exit_ms`) count from the start of the process; the others are durations:
    /// until the VMM ran, from the guest's kernel to its agent (by the guest's clock), from the VMM to a sandbox that is
    /// ready, of the container's creation, and of the removal of everything. What did not happen is null.
    pub(crate) fn line(&self) -> String {
        let moment = |at: Option<Instant>| at.map(|at| ms(at.saturating_duration_since(self.started)));
        let timing = serde_json::json!({"timing": {
            "vmm_spawn_ms": self.sandbox.map(|timings| ms(timings.vmm_spawn)),
            "kernel_to_agent_ms": self.guest.map(|timings| ms(timings.agent_started)),
            "agent_ready_ms": self.sandbox.map(|timings| ms(timings.agent_ready + timings.sandbox_created)),
            "container_created_ms": self.created.map(ms),
            "first_output_ms": moment(self.first_output),
            "exit_ms": moment(self.exited),
            "teardown_ms": self.teardown.map(ms),
        }});
        format!("bulkhead: timing {timing}")
    }
}

/// Milliseconds with a fraction of three digits.
fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_is_json_after_its_prefix() {
        let started = Instant::now();
        let mut timing = Timing::new(started);
        timing.exited = Some(started + Duration::from_micros(1_234_567));
        timing.sandbox = Some(Timings { vmm_spawn: Duration::from_millis(20), ..Timings::default() });
        let line = timing.line();
        let json: serde_json::Value =
            serde_json::from_str(line.strip_prefix("bulkhead: timing ").unwrap()).unwrap();
        assert_eq!(json["timing"]["exit_ms"], 1234.567);
        assert_eq!(json["timing"]["vmm_spawn_ms"], 20.0);
        assert!(json["timing"]["first_output_ms"].is_null());
        assert_eq!(json["timing"].as_object().unwrap().len(), 7);
    }
}
