//! The requests for containers, processes, the sandbox and the machine.

use anyhow::ensure;
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Hardware, in_vm},
    cases,
};

pub(super) const CASES: &[Case] = cases![a_container_runs_in_a_vm];

fn a_container_runs_in_a_vm(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.check().await?;
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let (output, code) = agent.shell("c1", "e1", "echo hello; exit 3").await?;
        ensure!(output == "hello\n" && code == 3, "{output} {code}");
        agent.remove("c1").await?;
        Ok(())
    })
}
