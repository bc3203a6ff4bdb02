//! Policies in a guest.

use anyhow::ensure;
use bulkhead_e2e::{
    Case, Scratch,
    agent::{Hardware, context, failed, in_vm, process},
    cases,
};
use bulkhead_protocol::{agent::SetPolicyRequest, status::Kind};

pub(super) const CASES: &[Case] = cases![a_policy_denies_in_a_vm];

fn a_policy_denies_in_a_vm(scratch: &Scratch) -> anyhow::Result<()> {
    in_vm(scratch, Hardware::default(), async |agent| {
        agent.pod().await?;
        agent.run("c1", &["sleep", "1000"]).await?;
        let policy = "package agent_policy
            RemoveContainerRequest := true
            ExecProcessRequest if input.process.Args == [\"true\"]
            WaitProcessRequest if input.container_id == \"c1\"";
        let request = SetPolicyRequest { policy: policy.into(), ..Default::default() };
        agent.client.set_policy(context(), &request).await?;
        let denied = failed(agent.exec("c1", "e1", process(&["sh"])).await, Kind::PermissionDenied)?;
        ensure!(denied == "ExecProcessRequest is blocked by policy", "{denied}");
        agent.exec("c1", "e1", process(&["true"])).await?;
        ensure!(agent.wait("c1", "e1").await? == 0);
        failed(agent.client.set_policy(context(), &request).await, Kind::PermissionDenied)?;
        agent.remove("c1").await?;
        Ok(())
    })
}
