//! Liveness and version.

use async_trait::async_trait;
use bulkhead_protocol::{
    health::{CheckRequest, HealthCheckResponse, VersionCheckResponse, health_check_response::ServingStatus},
    health_ttrpc,
};
use ttrpc::r#async::TtrpcContext;

/// The version of the agent API that this agent speaks.
const API_VERSION: &str = "0.0.1";

/// The health service.
pub(super) struct Health;

#[async_trait]
impl health_ttrpc::Health for Health {
    async fn check(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<HealthCheckResponse> {
        Ok(HealthCheckResponse { status: ServingStatus::SERVING.into(), ..Default::default() })
    }

    async fn version(&self, _: &TtrpcContext, _: CheckRequest) -> ttrpc::Result<VersionCheckResponse> {
        Ok(VersionCheckResponse {
            grpc_version: API_VERSION.into(),
            agent_version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }
}
