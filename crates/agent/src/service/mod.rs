//! The agent's RPCs: one line of the table each, one method in its family's file.

mod container;
mod files;
mod health;
mod memory;
mod network;
mod process;
mod sandbox;
mod system;
mod volume;

use std::{collections::HashMap, sync::Arc};

use async_trait::async_trait;
use bulkhead_protocol::{
    Empty,
    agent::{self, *},
    agent_ttrpc::{AgentService, create_agent_service},
    csi::VolumeStatsResponse,
    health_ttrpc::create_health,
    ports::GUEST_SHARE,
    types::Interface,
};
use ttrpc::r#async::TtrpcContext;

pub(crate) use process::user_names;

use crate::{
    copy::Copies, metrics::Metrics, network::Network, policy::Policy, sandbox::Sandbox, sync::Lane,
    trace::Tracer, volume::Sweep,
};

/// What every RPC works on.
pub(crate) struct Service {
    sandbox: Arc<Sandbox>,
    metrics: Metrics,
    copies: Arc<Copies>,
    sweep: Sweep,
    network: Arc<Network>,
    policy: Arc<Policy>,
    tracer: Tracer,
    lanes: Lanes,
}

/// What can hang with a volume of the host hangs in its own family only.
struct Lanes {
    files: Lane,
    volumes: Lane,
    metrics: Lane,
}

impl Default for Lanes {
    fn default() -> Lanes {
        Lanes { files: Lane::new(WIDTH), volumes: Lane::new(WIDTH), metrics: Lane::new(WIDTH) }
    }
}

/// So many requests of a family may hang at a time.
const WIDTH: usize = 16;

/// Everything the agent's server offers.
pub(crate) fn services(
    sandbox: Arc<Sandbox>,
    metrics: Metrics,
    tracer: Tracer,
    policy: Arc<Policy>,
) -> HashMap<String, ttrpc::r#async::Service> {
    let mut services = create_agent_service(Arc::new(Service {
        sandbox,
        metrics,
        copies: Arc::new(Copies::below(GUEST_SHARE)),
        sweep: Sweep::default(),
        network: Arc::default(),
        policy,
        tracer,
        lanes: Lanes::default(),
    }));
    services.extend(create_health(Arc::new(health::Health)));
    services
}

macro_rules! agent_service {
    ($($method:ident($request:ty) -> $reply:ty = $family:ident::$function:ident;)*) => {
        #[async_trait]
        impl AgentService for Service {
            $(async fn $method(&self, context: &TtrpcContext, request: $request) -> ttrpc::Result<$reply> {
                let span = self.tracer.begin(stringify!($method), context);
                let result = $family::$function(self, request).await;
                if let Some(span) = span {
                    span.end(&result);
                }
                Ok(result?)
            })*
        }
    };
}

agent_service! {
    create_sandbox(CreateSandboxRequest) -> Empty = sandbox::create;
    destroy_sandbox(DestroySandboxRequest) -> Empty = sandbox::destroy;
    get_oom_event(GetOOMEventRequest) -> OOMEvent = sandbox::oom_event;

    create_container(CreateContainerRequest) -> Empty = container::create;
    start_container(StartContainerRequest) -> Empty = container::start;
    remove_container(RemoveContainerRequest) -> Empty = container::remove;
    update_container(UpdateContainerRequest) -> Empty = container::update;
    stats_container(StatsContainerRequest) -> StatsContainerResponse = container::stats;
    pause_container(PauseContainerRequest) -> Empty = container::pause;
    resume_container(ResumeContainerRequest) -> Empty = container::resume;

    exec_process(ExecProcessRequest) -> Empty = process::exec;
    signal_process(SignalProcessRequest) -> Empty = process::signal;
    wait_process(WaitProcessRequest) -> WaitProcessResponse = process::wait;
    write_stdin(WriteStreamRequest) -> WriteStreamResponse = process::write_stdin;
    close_stdin(CloseStdinRequest) -> Empty = process::close_stdin;
    read_stdout(ReadStreamRequest) -> ReadStreamResponse = process::read_stdout;
    read_stderr(ReadStreamRequest) -> ReadStreamResponse = process::read_stderr;
    tty_win_resize(TtyWinResizeRequest) -> Empty = process::resize;

    get_guest_details(GuestDetailsRequest) -> GuestDetailsResponse = system::details;
    get_metrics(GetMetricsRequest) -> agent::Metrics = system::metrics;
    reseed_random_dev(ReseedRandomDevRequest) -> Empty = system::reseed;
    set_guest_date_time(SetGuestDateTimeRequest) -> Empty = system::set_time;

    add_arp_neighbors(AddARPNeighborsRequest) -> Empty = network::add_neighbours;
    get_ip_tables(GetIPTablesRequest) -> GetIPTablesResponse = network::ip_tables;
    list_interfaces(ListInterfacesRequest) -> Interfaces = network::interfaces;
    list_routes(ListRoutesRequest) -> Routes = network::routes;
    set_ip_tables(SetIPTablesRequest) -> SetIPTablesResponse = network::set_ip_tables;
    update_interface(UpdateInterfaceRequest) -> Interface = network::update_interface;
    update_routes(UpdateRoutesRequest) -> Routes = network::update_routes;

    add_swap(AddSwapRequest) -> Empty = memory::add_swap;
    add_swap_path(AddSwapPathRequest) -> Empty = memory::add_swap_path;
    mem_agent_compact_set(MemAgentCompactConfig) -> Empty = memory::reclaim_compact;
    mem_agent_memcg_set(MemAgentMemcgConfig) -> Empty = memory::reclaim_memcg;
    mem_hotplug_by_probe(MemHotplugByProbeRequest) -> Empty = memory::probe;
    online_cpu_mem(OnlineCPUMemRequest) -> Empty = memory::online;

    copy_file(CopyFileRequest) -> Empty = files::copy;
    get_diagnostic_data(GetDiagnosticDataRequest) -> GetDiagnosticDataResponse = files::diagnostic_data;

    get_volume_stats(VolumeStatsRequest) -> VolumeStatsResponse = volume::stats;
    remove_stale_virtiofs_share_mounts(RemoveStaleVirtiofsShareMountsRequest) -> Empty = volume::remove_stale;
    resize_volume(ResizeVolumeRequest) -> Empty = volume::resize;
    update_ephemeral_mounts(UpdateEphemeralMountsRequest) -> Empty = volume::update_ephemeral;
    set_policy(SetPolicyRequest) -> Empty = system::set_policy;
}

#[cfg(test)]
mod tests {
    use std::{sync::OnceLock, time::Duration};

    use bulkhead_protocol::protobuf::Enum;

    use super::*;
    use crate::{
        boot::{Guest, Times},
        config::Config,
    };

    const UNBUILT: [&str; 2] = ["MemAgentCompactSet", "MemAgentMemcgSet"];

    fn context() -> TtrpcContext {
        TtrpcContext {
            mh: Default::default(),
            metadata: HashMap::new(),
            timeout_nano: 0,
            connection_data: Default::default(),
        }
    }

    /// Asks every RPC of the service, with an empty request, over the dispatch table of the server.
    #[tokio::test]
    async fn what_is_not_built_says_so_and_nothing_else_does() {
        let times = Times { started: Duration::ZERO, listening: Arc::new(OnceLock::new()) };
        let sandbox = Sandbox::new(Arc::new(Guest::plain()), Config::default());
        let services = services(sandbox, Metrics::new(times), Tracer::default(), Arc::default());
        let mut unbuilt = Vec::new();
        for (name, method) in &services["grpc.AgentService"].methods {
            let answer = method.handler(context(), ttrpc::Request::default());
            // GetOOMEvent waits for an event.
            let Ok(answer) = tokio::time::timeout(Duration::from_secs(1), answer).await else { continue };
            let answer = answer.unwrap();
            if answer.status.code.value() == ttrpc::Code::UNIMPLEMENTED.value() {
                assert!(answer.status.message.contains(name.as_str()), "{}", answer.status.message);
                unbuilt.push(name.as_str());
            }
            assert_ne!(answer.status.code.value(), ttrpc::Code::NOT_FOUND.value(), "{name} is in no table");
        }
        unbuilt.sort_unstable();
        assert_eq!(unbuilt, UNBUILT);
    }
}
